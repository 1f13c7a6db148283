# SPDX-License-Identifier: Apache-2.0
"""Hold a method's target in the sparse model itself, whatever else runs beside its masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from spon_plugin.calibration.sensitivity import MATCH_TOKENS, matching_factor
from spon_plugin.calibration.streaming import window_batches
from spon_plugin.decoder.head import run_backbone
from spon_plugin.decoder.positions import whole_windows
from spon_plugin.decoder.sparsity import SparsityCounter


class Scalable(Protocol):
    """A `SparseMethod` whose thresholds can be multiplied."""

    def with_factor(self, logarithm: float) -> Any:
        """The same with thresholds that are ``exp(logarithm)`` times as high."""

    def attach(self, model: nn.Module, alphas: Mapping[str, Tensor] | None, counter: SparsityCounter | None) -> Any:
        """See `SparseMethod.attach`."""

    def masked_share(self, counter: SparsityCounter) -> float:
        """See `SparseMethod.masked_share`."""


Method = TypeVar("Method", bound=Scalable)


@torch.no_grad()
def match_method(
    model: nn.Module,
    method: Method,
    windows: Tensor,
    sparsity: float,
    alphas: Mapping[str, Tensor] | None = None,
    batch_size: int = 4,
) -> Method:
    """The method with all thresholds multiplied by one factor, so that the sparse model achieves the target.

    Args:
        model: the dense model.
        method: with thresholds.
        windows: token ids ``[count, length]``, of which the first `MATCH_TOKENS` tokens are measured on.
        sparsity: the target.
        alphas: that run beside the masks.
        batch_size: windows per forward pass.
    """
    windows = windows[: max(1, MATCH_TOKENS // windows.shape[1])]
    device = next(model.parameters()).device
    alphas = {path: alpha.detach() for path, alpha in (alphas or {}).items()}

    def achieved(logarithm: float) -> float:
        counter, scaled = SparsityCounter(), method.with_factor(logarithm)
        with scaled.attach(model, alphas, counter), whole_windows():
            for _, batch in window_batches(windows, batch_size):
                run_backbone(model, batch.to(device))
        return float(scaled.masked_share(counter))

    matched: Method = method.with_factor(matching_factor(achieved, sparsity))
    return matched
