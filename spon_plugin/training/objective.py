# SPDX-License-Identifier: Apache-2.0
"""What alphas are trained to minimize: the KL divergence of SPON, and options beside it, all of them off by default."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from spon_plugin.decoder.block_states import BlockStates, spread_blocks
from spon_plugin.errors import SponError
from spon_plugin.training.distillation import Head, kl_divergence


@dataclass(frozen=True)
class Objective:
    """``sum_t w_t (KL_t + hidden_weight * D_t)`` over the tokens that count.

    Attributes:
        temperature: divides both models' logits; greater than 0.
        top_k: `KL_t` is over the dense model's `top_k` likeliest tokens and one bin with all others; 0 for every token
            of the vocabulary by itself.
        entropy_power: ``w_t = (1 + H_t) ** entropy_power``, `H_t` the entropy of the dense model's distribution in
            nats; positive where uncertain tokens are to count more, negative where sure ones are; 0 for ``w_t = 1``.
            `D_t` is not weighted.
        hidden_weight: of `D_t`, the mean over some decoder blocks of ``|h_sparse - h_dense|^2 / |h_dense|^2``; 0 for
            none.
        hidden_blocks: how many blocks, at equal distances, the last one among them.

    Raises:
        SponError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    entropy_power: float = 0.0
    hidden_weight: float = 0.0
    hidden_blocks: int = 4

    def __post_init__(self) -> None:
        """Check every value."""
        if not 0 < self.temperature < math.inf:
            raise SponError.of("temperature", self.temperature, "a number > 0")
        if not _is_whole(self.top_k) or self.top_k < 0:
            raise SponError.of("top_k", self.top_k, "a whole number, 0 for the whole vocabulary")
        if not math.isfinite(self.entropy_power):
            raise SponError.of("entropy_power", self.entropy_power, "a finite number, 0 for equal weights")
        if not 0 <= self.hidden_weight < math.inf:
            raise SponError.of("hidden_weight", self.hidden_weight, "a number of at least 0")
        if not _is_whole(self.hidden_blocks) or self.hidden_blocks < 1:
            raise SponError.of("hidden_blocks", self.hidden_blocks, "a whole number of at least 1")

    def block_states(self, model: nn.Module) -> BlockStates | None:
        """What a pass has to put beside each token for `loss`; None without a term of hidden states.

        Raises:
            SponError: the model has fewer blocks than are asked for.
        """
        return BlockStates(model, spread_blocks(model, self.hidden_blocks)) if self.hidden_weight else None

    def loss(
        self, student: Tensor, teacher: Tensor, head: Head | None = None, states: BlockStates | None = None
    ) -> Tensor:
        """The sum over tokens, in float32.

        Args:
            student: ``[n, features]``: hidden states, or logits without `head`, and after them the blocks' states.
            teacher: the same of the dense model; receives no gradient.
            head: from hidden states to logits.
            states: of `block_states`; put the blocks' states there.
        """
        width = states.width if states is not None else 0
        final = student.shape[-1] - width
        total = kl_divergence(
            student[..., :final], teacher[..., :final], head, self.temperature,
            top_k=self.top_k, entropy_power=self.entropy_power,
        )  # fmt: skip
        if states is not None:
            distance = hidden_distance(student[..., final:], teacher[..., final:].detach(), len(states.blocks))
            total = total + self.hidden_weight * distance
        return total


def hidden_distance(student: Tensor, teacher: Tensor, blocks: int) -> Tensor:
    """``sum_t mean_b |h_tb - g_tb|^2 / |g_tb|^2``, float32.

    Args:
        student: ``[n, blocks * hidden]``, the states `h` of one block after another.
        teacher: likewise, `g`.
        blocks: how many.
    """
    h, g = (x.float().unflatten(-1, (blocks, -1)) for x in (student, teacher))
    return ((h - g).square().sum(-1) / g.square().sum(-1).clamp(min=1e-12)).mean(-1).sum()


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
