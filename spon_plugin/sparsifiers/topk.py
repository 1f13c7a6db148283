# SPDX-License-Identifier: Apache-2.0
"""Top-k: keep each token's k largest ``|x_i|``; what thresholds approximate, with the same sparsity at every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spon_plugin.decoder.sites import Site
from spon_plugin.masking import zero_dropped
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Fitted, Sparsifier, Statistics


def top_k_mask(x: Tensor, share: float) -> Tensor:
    """The entries with the largest magnitudes of each row, ties broken arbitrarily.

    Args:
        x: ``[..., in_features]``.
        share: of the entries that are dropped; ``int((1 - share) * in_features)`` are kept, as in LaRoSA's code.

    Returns:
        bool ``[..., in_features]``.
    """
    k = int((1 - share) * x.shape[-1])
    kept = x.detach().abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, kept, True)


class TopKFitted(Fitted):
    """See `TopK`.

    Attributes:
        shares: site name -> share of the entries that are dropped.
    """

    def __init__(
        self, name: str, statistics: Statistics, sparsity: float, shares: dict[str, float] | None = None
    ) -> None:
        super().__init__(name, statistics, sparsity)
        self.shares = shares if shares is not None else {site.name: self.sparsity for site in self.sites}

    def sparse_input(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `SparseMethod.sparse_input`."""
        keep = top_k_mask(x, self.shares[site.name])
        return zero_dropped(x, keep), keep


class TopK(Sparsifier):
    """``S(x)_i = x_i if |x_i| is among the token's k largest else 0`` at every site; evaluation only.

    A sort per token and layer costs more than it saves in decoding; the row says what a perfect threshold per token
    would give.
    """

    name, title = "topk", "top-k"

    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> TopKFitted:
        """See `Sparsifier.at`."""
        return TopKFitted(self.name, statistics, sparsity)
