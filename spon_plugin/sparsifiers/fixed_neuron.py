# SPDX-License-Identifier: Apache-2.0
"""Fixed neuron pruning: the static baseline of SPON (arXiv 2512.12744), which drops the same inputs for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.decoder.sites import Site
from spon_plugin.masking import zero_dropped
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Fitted, Sparsifier, Statistics


class MagnitudeSum:
    """``sum_t |x_ti|``, float32 ``[in_features]``."""

    def __init__(self, size: int) -> None:
        self.total = torch.zeros(size)

    def update(self, rows: Tensor) -> None:
        """Add ``[tokens, in_features]``."""
        self.total += rows.float().abs().sum(0).cpu()


class FixedNeuronFitted(Fitted):
    """See `FixedNeuron`.

    Attributes:
        keep: site name -> bool ``[in_features]``.
    """

    def __init__(self, name: str, statistics: Statistics, sparsity: float, keep: dict[str, Tensor]) -> None:
        super().__init__(name, statistics, sparsity)
        self.keep = keep

    def sparse_input(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `SparseMethod.sparse_input`."""
        keep = self.keep[site.name].to(x.device)
        return zero_dropped(x, keep), keep.expand_as(x)


class FixedNeuron(Sparsifier):
    """Drops the input channels with the lowest mean magnitude on the calibration text: TEAL's criterion, made static.

    The weights' columns are gone for every token, the first included.
    """

    name, title, static = "fixed-neuron", "fixed neurons", True

    def observer(self, model: nn.Module, site: Site, statistics: Statistics) -> Any:
        """See `Sparsifier.observer`."""
        return MagnitudeSum(site.in_features)

    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> FixedNeuronFitted:
        """See `Sparsifier.at`."""
        keep = {}
        for site in statistics.sites:
            order = statistics.own[site.name].total.argsort(descending=True)
            keep[site.name] = torch.zeros(site.in_features, dtype=torch.bool)
            keep[site.name][order[: site.in_features - int(sparsity * site.in_features)]] = True
        return FixedNeuronFitted(self.name, statistics, sparsity, keep)
