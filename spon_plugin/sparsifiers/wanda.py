# SPDX-License-Identifier: Apache-2.0
"""Wanda (arXiv 2306.11695, github.com/locuslab/wanda): a static baseline that prunes single weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.decoder.sites import Site
from spon_plugin.decoder.sparsity import SparsityCounter
from spon_plugin.errors import SponError
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Fitted, Sparsifier, Statistics, readable_weight
from spon_plugin.weights.linears import is_conv1d


class SquareSum:
    """``sum_t x_ti^2``, float32 ``[in_features]``: the square of ``||X_i||_2``."""

    def __init__(self, size: int) -> None:
        self.total = torch.zeros(size)

    def update(self, rows: Tensor) -> None:
        """Add ``[tokens, in_features]``."""
        self.total += rows.float().square().sum(0).cpu()


def pruned_weights(score: Tensor, share: float) -> Tensor:
    """The ``int(in_features * share)`` lowest scores of each output row (unstructured).

    Args:
        score: ``[out_features, in_features]``.
        share: to prune.

    Returns:
        bool ``[out_features, in_features]``, True where the weight goes.
    """
    lowest = score.sort(dim=-1, stable=True).indices[:, : int(score.shape[1] * share)]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, lowest, True)


def pruned_two_of_four(score: Tensor) -> Tensor:
    """The two lowest scores in every four neighbours of an output row; arguments and result as `pruned_weights`."""
    groups = score.unflatten(1, (-1, 4))
    lowest = groups.topk(2, dim=-1, largest=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, lowest, True).flatten(1)


class WandaFitted(Fitted):
    """See `Wanda`.

    Attributes:
        pruned: module path -> bool in the layout of the module's weight, True where the weight is zero.
    """

    def __init__(self, name: str, statistics: Statistics, sparsity: float, pruned: dict[str, Tensor]) -> None:
        super().__init__(name, statistics, sparsity)
        self.pruned = pruned

    def sparse_input(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The whole input: the weights are sparse here."""
        return x, None

    def weight(self, path: str, weight: Tensor) -> Tensor | None:
        """See `Fitted.weight`."""
        return weight.detach().masked_fill(self.pruned[path].to(weight.device), 0)

    def drops(self, counter: SparsityCounter) -> dict[str, float]:
        """See `Fitted.drops`; known without a run."""
        return {path: float(pruned.float().mean()) for path, pruned in self.pruned.items()}


class Wanda(Sparsifier):
    """Prunes the lowest ``|W_ij| * ||X_j||_2`` of every output row.

    Deviations: all layers' inputs are those of the dense model, collected in one pass; the released code prunes block
    by block and feeds each block the pruned ones' output. The weights are gone for every token, the first included.
    """

    name, title, static = "wanda", "Wanda", True

    def observer(self, model: nn.Module, site: Site, statistics: Statistics) -> Any:
        """See `Sparsifier.observer`."""
        return SquareSum(site.in_features)

    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> WandaFitted:
        """See `Sparsifier.at`."""
        pruned = {}
        for site in statistics.sites:
            norms = statistics.own[site.name].total.sqrt()
            for path in site.modules:
                weight = readable_weight(model, path)
                mask = self.prune(weight.float().abs() * norms.to(weight.device), sparsity)
                pruned[path] = mask.t().contiguous() if is_conv1d(model.get_submodule(path)) else mask
        return WandaFitted(self.name, statistics, sparsity, pruned)

    def prune(self, score: Tensor, sparsity: float) -> Tensor:
        """The mask of one weight, see `pruned_weights`."""
        return pruned_weights(score, sparsity)


class Wanda24(Wanda):
    """Wanda's 2:4: two of every four neighbouring inputs go, which GPUs' sparse tensor cores can skip; 50% only."""

    name, title, universal = "wanda-2:4", "Wanda 2:4", False

    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> WandaFitted:
        """See `Sparsifier.at`."""
        if sparsity != 0.5:
            raise SponError.of("sparsity", sparsity, "0.5, the only one that 2:4 has")
        widths = {site.name: site.in_features for site in statistics.sites if site.in_features % 4}
        for name, width in widths.items():
            raise SponError.of(f"{name}: in_features", width, "a multiple of 4")
        return super().at(model, statistics, sparsity)

    def prune(self, score: Tensor, sparsity: float) -> Tensor:
        """The mask of one weight, see `pruned_two_of_four`."""
        return pruned_two_of_four(score)
