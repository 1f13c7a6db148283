# SPDX-License-Identifier: Apache-2.0
"""What masks do to a model: how much they drop of each linear's input, and what on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spon_plugin.adapter.mask import Mask
from spon_plugin.calibration.streaming import SINKS, Observe, counted_rows, stream_inputs, window_batches
from spon_plugin.decoder.head import run_backbone
from spon_plugin.decoder.masked_linears import sparse_inputs
from spon_plugin.decoder.positions import whole_windows
from spon_plugin.decoder.sites import Site, module_weights
from spon_plugin.decoder.sparsity import SparsityCounter
from spon_plugin.masking import sparsify


@torch.no_grad()
def measure_sparsity(
    model: nn.Module,
    sites: Sequence[Site],
    masks: Mapping[str, Mask],
    windows: Tensor,
    dense_prefix: int = 0,
    batch_size: int = 4,
) -> tuple[float, dict[str, float]]:
    """The sparsity that masks achieve in the sparse model itself; use tokens that calibration did not see.

    Args:
        model: a dense decoder.
        sites: from `find_sites`.
        masks: module path -> mask, with its alpha.
        windows: token ids ``[count, length]``.
        dense_prefix: positions at the start of each window that stay dense and are not counted.
        batch_size: windows per forward pass.

    Returns:
        The model-wide share, linears weighted by their weights, and the share per module path.
    """
    counter = SparsityCounter()
    with sparse_inputs(model, masks, dense_prefix, counter), whole_windows():
        device = next(model.parameters()).device
        masked = [model.get_submodule(path) for path in masks]
        for _, batch in window_batches(windows, batch_size):
            run_backbone(model, batch.to(device), masked)
    return counter.overall(module_weights(sites)), counter.per_module()


@torch.no_grad()
def mean_alphas(
    model: nn.Module,
    sites: Sequence[Site],
    masks: Mapping[str, Mask],
    windows: Tensor,
    skip: int = SINKS,
    batch_size: int = 4,
) -> dict[str, Tensor]:
    """``alpha = E[x - S(x)]`` over dense activations: a bias without training, the control of every SPON table.

    Args:
        model: a dense decoder.
        sites: from `find_sites`.
        masks: module path -> mask.
        windows: token ids ``[count, length]``.
        skip: positions at the start of each window that are not counted.
        batch_size: windows per forward pass.

    Returns:
        Module path -> float32 ``[in_features]``.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def observe(path: str) -> Observe:
        def update(x: Tensor, special: Tensor | None) -> None:
            x = counted_rows(x, special)
            mask = masks[path].to(x.device)
            dropped = (x - sparsify(x, mask.threshold, None, mask.center)).float().sum(0).cpu()
            sums[path] = sums.get(path, torch.zeros_like(dropped)) + dropped
            rows[path] = rows.get(path, 0) + x.shape[0]

        return update

    # Every linear by itself: those of a site read one tensor, but each may have its own mask.
    stream_inputs(model, {path: observe(path) for path in module_weights(sites)}, windows, skip, batch_size)
    return {path: total / rows[path] for path, total in sums.items()}
