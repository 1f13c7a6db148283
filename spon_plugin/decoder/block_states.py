# SPDX-License-Identifier: Apache-2.0
"""The states after some decoder blocks, beside what a pass through the model gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.decoder.sites import decoder_blocks
from spon_plugin.errors import SponError


def spread_blocks(model: nn.Module, count: int) -> list[str]:
    """The paths of `count` decoder blocks at equal distances, the last one among them.

    Raises:
        SponError: the model has fewer.
    """
    paths = [path for path, _ in decoder_blocks(model)]
    if not 1 <= count <= len(paths):
        raise SponError.of("hidden_blocks", count, f"at least 1 and at most {len(paths)}, the model's")
    return [paths[round((index + 1) * len(paths) / count) - 1] for index in range(count)]


class BlockStates:
    """Puts the states after some blocks beside each token's output.

    Args:
        model: a decoder.
        paths: of the blocks.

    Attributes:
        width: of the states of one token, all blocks together; 0 before the first pass.
    """

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        self.blocks = [model.get_submodule(path) for path in paths]
        self.width = 0

    def beside(self, run: Callable[[], Tensor]) -> Tensor:
        """What `run` gives, ``[batch, sequence, features]``, with the blocks' states after the features.

        Args:
            run: one pass of all tokens through the model.

        Returns:
            ``[batch, sequence, features + width]`` in the dtype of what `run` gives.

        Raises:
            SponError: gradients are asked for and do not reach the states.
        """
        states: list[Tensor] = []

        def keep(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        handles = [block.register_forward_hook(keep) for block in self.blocks]
        try:
            output = run()
        finally:
            for handle in handles:
                handle.remove()
        states = states[: len(self.blocks)]
        if output.requires_grad and not any(state.requires_grad for state in states):
            expected = "0 with reentrant gradient checkpointing, which hides the gradients of the blocks' states"
            raise SponError.of(
                "hidden_weight", "more", expected, "Use gradient_checkpointing_kwargs use_reentrant=False."
            )
        self.width = sum(state.shape[-1] for state in states)
        return torch.cat([output, *(state.to(output.dtype) for state in states)], dim=-1)
