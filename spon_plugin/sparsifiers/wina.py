# SPDX-License-Identifier: Apache-2.0
"""WINA (arXiv 2505.19427, github.com/microsoft/wina): keep the largest ``|x_i| * ||W_:,i||``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.adapter.mask import Mask
from spon_plugin.calibration.histogram import MagnitudeHistogram
from spon_plugin.decoder.sites import Site
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Statistics
from spon_plugin.sparsifiers.thresholds import ThresholdFitted, ThresholdSparsifier, column_norms


class ScoreHistogram:
    """Magnitudes of ``x_i * norm_i``.

    Attributes:
        norms: float32 ``[in_features]``, of the site's weights.
        histogram: of the scores.
    """

    def __init__(self, norms: Tensor) -> None:
        self.norms = norms
        self.histogram = MagnitudeHistogram()

    def update(self, rows: Tensor) -> None:
        """Count the scores of ``[tokens, in_features]``."""
        self.histogram.update(rows.float() * self.norms.to(rows.device))

    def threshold(self, share: float) -> Tensor:
        """``tau / norm_i``, float32 ``[in_features]``, below which a share of all entries lies."""
        tau = self.histogram.quantile(share)
        # A channel without weights is dropped whatever its input: its threshold is the largest number there is.
        return (tau / self.norms).nan_to_num(0.0, posinf=torch.finfo(torch.float32).max)


class Wina(ThresholdSparsifier):
    """``|x_i| * c_i > tau`` with ``c_i = ||W_:,i||_2`` as a threshold ``tau / c_i`` per channel.

    Deviations: the norm is over the stacked weights of the linears that share the input, so that they share a mask;
    the released code takes it over one of them and keeps the others' at 1. It also rotates the weights first
    (`tensor_transform`), which makes its bound exact and changes the model's layers; we do not. The paper keeps the
    top k per token; we take its threshold mode.
    """

    name, title = "wina", "WINA"

    def observer(self, model: nn.Module, site: Site, statistics: Statistics) -> Any:
        """See `Sparsifier.observer`."""
        return ScoreHistogram(column_norms(model, site))

    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> ThresholdFitted:
        """See `Sparsifier.at`."""
        masks = {name: Mask(own.threshold(sparsity)) for name, own in statistics.own.items()}
        return ThresholdFitted(self.name, statistics, sparsity, masks)
