# SPDX-License-Identifier: Apache-2.0
"""TEAL (arXiv 2408.14690, github.com/FasterDecoding/TEAL): keep ``|x_i| > tau``."""

from __future__ import annotations

import torch
from torch import nn

from spon_plugin.adapter.mask import Mask
from spon_plugin.calibration.allocation import allocate_greedy
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Statistics
from spon_plugin.sparsifiers.thresholds import ThresholdFitted, ThresholdSparsifier

GREEDY_TOKENS = 1024
"""Tokens of the calibration text that the allocation is made on, many times over."""


class Teal(ThresholdSparsifier):
    """``S(x)_i = x_i if |x_i| > tau else 0``, tau the quantile of ``|x|`` at the target.

    Deviations from the released code: one threshold per site rather than per linear (they see the same tensor), and
    the quantile is that of the calibration tokens' histogram without the attention sink.
    """

    name, title = "teal", "TEAL"

    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> ThresholdFitted:
        """See `Sparsifier.at`."""
        masks = {
            name: Mask(torch.tensor([histogram.quantile(sparsity)]))
            for name, histogram in statistics.histograms.items()
        }
        return ThresholdFitted(self.name, statistics, sparsity, masks)


class TealGreedy(ThresholdSparsifier):
    """TEAL with its block-wise greedy allocation (algorithm 1); see `calibration.allocation.allocate_greedy`."""

    name, title = "teal-greedy", "TEAL, greedy"

    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> ThresholdFitted:
        """See `Sparsifier.at`."""
        sites, histograms, windows = statistics.sites, statistics.histograms, statistics.windows
        few = windows[: max(1, GREEDY_TOKENS // windows.shape[1])]
        prefix = statistics.dense_prefix
        shares = allocate_greedy(model, sites, histograms, few, sparsity, dense_prefix=prefix, progress=progress)
        masks = {name: Mask(torch.tensor([histograms[name].quantile(share)])) for name, share in shares.items()}
        return ThresholdFitted(self.name, statistics, sparsity, masks, allocation="greedy")
