# SPDX-License-Identifier: Apache-2.0
"""Thresholds and centres per channel, from the output's Fisher information: `spon_plugin.calibration.sensitivity`."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from spon_plugin.calibration.sensitivity import RATE, collect_samples, match_sparsity, solve
from spon_plugin.progress import Progress
from spon_plugin.sparsifiers.base import Sparsifier, Statistics
from spon_plugin.sparsifiers.thresholds import ThresholdFitted

_SAMPLES = "samples"


class Sensitivity(Sparsifier):
    """``S(x)_i = x_i if |x_i - c_i| > tau_i else c_i``, both from how much the output feels channel `i` of a linear.

    Ours, not a paper's. Every linear has its own thresholds, and masks its input by itself; the linears of a site share
    the centres. The target holds for the whole model and is met in the sparse model itself.
    """

    name, title = "sensitivity", "Sensitivity"

    def complete(self, model: nn.Module, statistics: Statistics, progress: Progress) -> None:
        """See `Sparsifier.complete`: the model runs forward and backward."""
        sites, windows, prefix = statistics.sites, statistics.windows, statistics.dense_prefix
        statistics.own[_SAMPLES] = collect_samples(model, sites, windows, prefix, progress=progress)

    def at(self, model: nn.Module, statistics: Statistics, sparsity: float) -> ThresholdFitted:
        """See `Sparsifier.at`."""
        sites, windows, prefix = statistics.sites, statistics.windows, statistics.dense_prefix
        masks = match_sparsity(model, sites, solve(statistics.own[_SAMPLES], sparsity), windows, sparsity, prefix)
        alone = _linear_by_linear(statistics)
        fitted = ThresholdFitted(self.name, alone, sparsity, masks, "sensitivity", matched=True)
        fitted.scales = {path: RATE * float(masks[path].threshold.mean()) for path in fitted.modules}
        return fitted


def _linear_by_linear(statistics: Statistics) -> Statistics:
    """The same statistics, with a site for every linear, named after it."""
    alone = [
        (site, replace(site, name=path, modules=(path,), module_weights=(weights,)))
        for site in statistics.sites
        for path, weights in zip(site.modules, site.module_weights, strict=True)
    ]
    histograms = {own.name: statistics.histograms[site.name] for site, own in alone}
    return replace(statistics, sites=[own for _, own in alone], histograms=histograms)
