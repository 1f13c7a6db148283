# SPDX-License-Identifier: Apache-2.0
"""SCAP (arXiv 2412.07174, github.com/IntelLabs/SCAP): keep ``|x_i - mode| > tau``, the mode folded into the bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.adapter.mask import Mask
from spon_plugin.calibration.histogram import BINS, MagnitudeHistogram
from spon_plugin.decoder.sites import Site
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Statistics
from spon_plugin.sparsifiers.thresholds import ThresholdFitted, ThresholdSparsifier


class SignedHistogram:
    """Counts of signed values: a `MagnitudeHistogram` for either sign, so memory does not depend on the tokens."""

    def __init__(self) -> None:
        self.positive, self.negative = MagnitudeHistogram(), MagnitudeHistogram()

    def update(self, rows: Tensor) -> None:
        """Count values of any shape. Zero counts as positive."""
        flat = rows.flatten()
        below = flat < 0
        self.positive.update(flat[~below])
        self.negative.update(flat[below])

    def values(self) -> tuple[Tensor, Tensor]:
        """Every bin that was hit: its middle, and its count."""
        edges = (torch.arange(BINS + 1, dtype=torch.int32) << 16).view(torch.float32)
        middle = (edges[:-1] + edges[1:]) / 2
        middle[0] = 0.0
        hit, below = self.positive.counts.nonzero().flatten(), self.negative.counts.nonzero().flatten()
        return (
            torch.cat([-middle[below], middle[hit]]),
            torch.cat([self.negative.counts[below], self.positive.counts[hit]]),
        )

    def median(self) -> float:
        """The middle of all values."""
        return weighted_quantile(*self.values(), 0.5)

    def distance_quantile(self, center: float, share: float) -> float:
        """The distance from `center` within which a share of all values lies."""
        values, counts = self.values()
        return weighted_quantile((values - center).abs(), counts, share) if share > 0 else 0.0


def weighted_quantile(values: Tensor, counts: Tensor, share: float) -> float:
    """The value at or below which a share of all counts lies."""
    order = values.argsort()
    cumulative = counts[order].cumsum(0)
    index = torch.searchsorted(cumulative, torch.tensor(share * int(cumulative[-1]), dtype=torch.float64))
    return float(values[order][min(int(index), len(order) - 1)])


class Scap(ThresholdSparsifier):
    """``S(x)_i = x_i if |x_i - eta| > tau else eta``: ``W S(x) = W (S(x) - eta) + W eta``, the last term a bias.

    eta is one number per layer, an estimate of the mode of its input: the median here (``median`` in the released
    code, which also offers a kernel density estimate); tau is the quantile of ``|x - eta|``.

    Deviations: all sites rather than the MLP alone, with the same target (the paper tunes one per layer type); the
    quantile is read from a histogram whose bins are 1/128 of a value wide.
    """

    name, title = "scap", "SCAP"

    def observer(self, model: nn.Module, site: Site, statistics: Statistics) -> Any:
        """See `Sparsifier.observer`."""
        return SignedHistogram()

    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> ThresholdFitted:
        """See `Sparsifier.at`."""
        masks = {}
        for site in statistics.sites:
            own: SignedHistogram = statistics.own[site.name]
            center = own.median()
            threshold = torch.tensor([own.distance_quantile(center, sparsity)])
            masks[site.name] = Mask(threshold, torch.full((site.in_features,), center))
        return ThresholdFitted(self.name, statistics, sparsity, masks)
