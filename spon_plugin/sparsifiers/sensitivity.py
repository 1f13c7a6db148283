# SPDX-License-Identifier: Apache-2.0
"""Thresholds and centres per channel, from the output's Fisher information: `spon_plugin.calibration.sensitivity`."""

from __future__ import annotations

from torch import nn

from spon_plugin.adapter.mask import Mask
from spon_plugin.calibration.sensitivity import (
    BLEND,
    RATE,
    RowSample,
    collect_fisher,
    match_sparsity,
    solve,
    where_there_is_room,
)
from spon_plugin.decoder.sites import Site
from spon_plugin.errors import SponError
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Statistics, linear_by_linear
from spon_plugin.sparsifiers.thresholds import ThresholdFitted, ThresholdSparsifier


class SensitivityFitted(ThresholdFitted):
    """See `Sensitivity`."""

    def alpha_scale(self, path: str, mask: Mask) -> float:
        """A part of the mean threshold; see `calibration.sensitivity.RATE`."""
        return RATE * float(mask.threshold.mean())


class Sensitivity(ThresholdSparsifier):
    """``S(x)_i = x_i if |x_i - c_i| > tau_i else c_i``, both from how much the output feels channel `i` of a linear.

    Ours, not a paper's. Every linear has its own thresholds, and masks its input by itself; the linears of a site share
    the centres. The target holds for the whole model and is met in the sparse model itself.

    Args:
        blend: see `calibration.sensitivity.solve`; ``sensitivity:0.8`` by name.

    Raises:
        SponError: it lies outside [0, 1].
    """

    name, title = "sensitivity", "Sensitivity"

    def __init__(self, blend: float = BLEND) -> None:
        if not 0 <= blend <= 1:
            raise SponError.of("method", f"sensitivity:{blend}", "a blend from 0 to 1", "Try sensitivity:0.8.")
        self.blend = blend
        if blend != BLEND:
            self.name, self.title = f"sensitivity:{blend:g}", f"Sensitivity, blend {blend:g}"

    @classmethod
    def of(cls, parameter: str) -> Sensitivity:
        """See `Sparsifier.of`: the blend."""
        try:
            return cls(float(parameter))
        except ValueError:
            expected = "sensitivity, or sensitivity:BLEND with a number from 0 to 1"
            raise SponError.of("method", f"sensitivity:{parameter}", expected) from None

    def observer(self, model: nn.Module, site: Site, statistics: Statistics) -> RowSample:
        """See `Sparsifier.observer`."""
        return RowSample.of(statistics.windows, statistics.skip)

    def complete(self, model: nn.Module, statistics: Statistics, progress: Progress) -> None:
        """See `Sparsifier.complete`: the model runs forward and backward."""
        sites = statistics.sites
        windows, skip, prefix = statistics.windows, statistics.skip, statistics.dense_prefix
        fisher = collect_fisher(model, sites, windows, skip, prefix, progress=progress)
        statistics.own = {site.name: statistics.own[site.name].sample(site, fisher) for site in sites}

    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> ThresholdFitted:
        """See `Sparsifier.at`."""
        sites, windows, prefix = statistics.sites, statistics.windows, statistics.dense_prefix
        device = next(model.parameters()).device
        samples = where_there_is_room([statistics.own[site.name] for site in sites], device)
        masks = match_sparsity(model, sites, solve(samples, sparsity, self.blend), windows, sparsity, prefix)
        return SensitivityFitted(self.name, linear_by_linear(statistics), sparsity, masks, "sensitivity", matched=True)
