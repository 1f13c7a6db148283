# SPDX-License-Identifier: Apache-2.0
"""`sparse_linear` in plain PyTorch: the truth that every kernel is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spon_plugin.kernels.arguments import Thresholds
from spon_plugin.masking import sparsify
from spon_plugin.weights.row_weight import RowWeight


def sparse_linear(
    x: Tensor,
    weight_t: Tensor | RowWeight,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
) -> Tensor:
    """``y = S(x) weight_t + bias``, accumulated in float32 (in float64 for float64 inputs).

    NaN and infinity in `x` are kept by the masking rule (`masking.keep_mask`), so they show in the output of their row
    and of no other. Weights are taken to be finite: a kernel does not read the rows it skips.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16.
        weight_t: ``[in_features, out_features]`` in `x.dtype`, contiguous: the transpose of a linear layer's weight. Or
            a `RowWeight`, which is decoded here.
        threshold: float32. ``[1]`` masks all outputs alike; ``[in_features]`` has one threshold per channel; with
            `shard_sizes`, ``[n_shards]`` has one per shard, and ``[n_shards, in_features]`` one per shard and channel.
        bias: ``[out_features]``, float32 or `x.dtype`; None for none.
        shard_sizes: the widths of the linears that a fused layer (qkv, gate_up) consists of; they add up to
            out_features. None for one.

    Returns:
        ``[..., out_features]`` in `x.dtype`.

    Example:
        >>> x, weight = torch.randn(2, 8), torch.randn(4, 8)
        >>> y = sparse_linear(x, weight.t().contiguous(), torch.tensor([0.5]), torch.zeros(4))
        >>> torch.allclose(y, (x * (x.abs() > 0.5)) @ weight.t(), atol=1e-6)
        True
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight_t = weight_t.dense() if isinstance(weight_t, RowWeight) else weight_t
    thresholds = Thresholds.of(threshold, weight_t, shard_sizes)
    columns = weight_t.to(wide).split(thresholds.sizes, dim=1)
    parts = [sparsify(x, row).to(wide) @ column for row, column in zip(thresholds.rows, columns, strict=True)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
