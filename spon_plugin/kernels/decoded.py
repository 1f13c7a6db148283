# SPDX-License-Identifier: Apache-2.0
"""`sparse_linear` for a weight in any format, by dense products on rows that are decoded a panel at a time.

On a CPU `cpu.panels` does both at once, unless it says `why_not`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spon_plugin.kernels.arguments import Thresholds, begins_within_a_byte
from spon_plugin.kernels.cpu import decode, panels, scaled
from spon_plugin.masking import sparsify
from spon_plugin.weights.product import chunk_elements
from spon_plugin.weights.row_weight import RowWeight
from spon_plugin.weights.scaled import ScaledWeight


@torch.no_grad()
def sparse_linear(
    x: Tensor,
    weight: RowWeight,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
    exact: bool = True,
) -> Tensor:
    """``y = S(x) W^T + bias`` in float32, rounded once: for many rows, and what no kernel takes. No gradient.

    `cpu.panels` may round weights to bfloat16 first, where x is.

    Args:
        x: as in `reference.sparse_linear`.
        weight: ``[in_features, out_features]``.
        threshold: as in `reference.sparse_linear`.
        bias: likewise.
        shard_sizes: likewise.
        exact: inputs are always taken as they are.
    """
    thresholds = Thresholds.of(threshold, weight.codes, shard_sizes, weight.out_features)
    whole = not begins_within_a_byte(thresholds.sizes, weight.unit)
    if isinstance(weight, ScaledWeight) and whole and not panels.why_not(x, weight):
        return panels.sparse_linear(x, weight, threshold, bias, shard_sizes=shard_sizes)
    rows = x.shape[:-1].numel()
    flat = x.reshape(rows, weight.in_features)
    kept = [sparsify(flat, row).float() for row in thresholds.rows]
    y = torch.zeros((rows, weight.out_features), dtype=torch.float32, device=x.device)
    depth = max(1, chunk_elements(x.device) // max(1, weight.out_features))
    for first in range(0, weight.in_features, depth):
        panel = _rows(weight, first, first + depth)
        parts = zip(kept, y.split(thresholds.sizes, 1), panel.split(thresholds.sizes, 1), strict=True)
        for inputs, out, columns in parts:
            out.addmm_(inputs[:, first : first + depth], columns)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.out_features)


def _rows(weight: RowWeight, first: int, stop: int) -> Tensor:
    """Rows of a weight in float32, by the CPU kernel where it reads them."""
    if isinstance(weight, ScaledWeight) and not scaled.why_not(weight):
        return decode.rows(weight, first, stop)
    return weight.rows(slice(first, stop)).float()
