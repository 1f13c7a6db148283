# SPDX-License-Identifier: Apache-2.0
"""How many tokens that a sparse model drafts its dense model accepts, and what that is worth at measured costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.decoder.attachment import SparseMethod
from spon_plugin.decoder.positions import whole_windows
from spon_plugin.progress import Progress, no_progress


@dataclass(frozen=True)
class Acceptance:
    """What a dense model accepts of its sparse model's tokens, each drafted after the same text.

    Attributes:
        greedy: the share of positions at which both models' best tokens are the same.
        sampled: the mean of ``sum(min(p, q))``, with which a token drawn from the sparse model's q is accepted.
        greedy_tokens: number of drafts -> tokens that a round gives on average: those accepted before the first that is
            not, and one of the dense model's own. It is counted on successive positions, as errors come in runs.
        sampled_tokens: likewise.
        tokens: positions that were compared.
    """

    greedy: float
    sampled: float
    greedy_tokens: dict[int, float]
    sampled_tokens: dict[int, float]
    tokens: int


@dataclass(frozen=True)
class StepCosts:
    """Seconds of steps that go on from a key-value cache.

    Attributes:
        plain: the dense model as it was loaded, one token.
        dense: the dense model on rows, one token.
        sparse: the sparse model, one token.
        verify: number of drafts -> the dense model on rows, so many tokens and one.
    """

    plain: float
    dense: float
    sparse: float
    verify: dict[int, float]

    def speedup(self, tokens: Mapping[int, float]) -> dict[int, float]:
        """Number of drafts -> tokens a second, over the faster of the two dense models.

        Args:
            tokens: number of drafts -> tokens that a round gives, as in `Acceptance`.
        """
        best = min(self.plain, self.dense)
        return {drafts: tokens[drafts] * best / (drafts * self.sparse + cost) for drafts, cost in self.verify.items()}


@torch.no_grad()
def acceptance(
    model: nn.Module,
    method: SparseMethod,
    windows: Tensor,
    drafts: Sequence[int],
    progress: Progress = no_progress,
    **added: Any,
) -> Acceptance:
    """Compare the dense and the sparse model at every position of a text, each on states of its own.

    Text that the model itself would write is easier to draft than text at large, so a generation may accept more.

    Args:
        model: the dense model.
        method: what runs it sparsely, such as an adapter's `MaskedLinears`.
        windows: token ids ``[count, length]``, longer than the largest of `drafts`.
        drafts: numbers of tokens that are drafted before the dense model reads them.
        progress: called after each window.
        added: ``alphas=`` or ``biases=`` of `SparseMethod.attach`.
    """
    device = next(model.parameters()).device
    same, overlap = [], []
    for done, window in enumerate(windows, start=1):
        ids = window[None].to(device)
        with whole_windows():
            p = model(input_ids=ids).logits[0].float()
            with method.attach(model, **added):
                q = model(input_ids=ids).logits[0].float()
        same.append((p.argmax(-1) == q.argmax(-1)).double().cpu())
        overlap.append(torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1).double().cpu())
        progress(done, len(windows))
    return Acceptance(
        float(torch.cat(same).mean()),
        float(torch.cat(overlap).mean()),
        {number: _tokens_of_a_round(same, number) for number in drafts},
        {number: _tokens_of_a_round(overlap, number) for number in drafts},
        windows.numel(),
    )


def _tokens_of_a_round(windows: Sequence[Tensor], drafts: int) -> float:
    """``1 + p1 + p1 p2 + ...``, averaged over every run of `drafts` positions of the windows."""
    runs = torch.cat([accepted.unfold(0, drafts, 1) for accepted in windows])
    return 1 + float(runs.cumprod(1).sum(1).mean())
