# SPDX-License-Identifier: Apache-2.0
"""The masked dense GEMM: for batches so large that hardly any channel is masked in all rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spon_plugin.kernels.arguments import Thresholds
from spon_plugin.masking import sparsify


def sparse_linear(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
) -> Tensor:
    """``y = S(x) weight_t + bias`` with one dense product per distinct mask, in the device's own GEMM.

    As accurate as a dense linear layer on that device in that dtype: a float32 bias is rounded to `x.dtype` first, and
    float32 follows `torch.backends.cuda.matmul`'s precision. No gradient.

    Args:
        x: as in `reference.sparse_linear`.
        weight_t: likewise.
        threshold: likewise.
        bias: likewise.
        shard_sizes: likewise.

    Returns:
        ``[..., out_features]`` in `x.dtype`.

    Raises:
        SponError: a threshold that does not fit. The operator has checked the rest.
    """
    thresholds = Thresholds.of(threshold, weight_t, shard_sizes)
    in_features, out_features = weight_t.shape
    rows = x.shape[:-1].numel()
    flat = x.reshape(rows, in_features)
    y = x.new_empty((rows, out_features))
    own_bias = None if bias is None else bias.to(x.dtype)
    with torch.no_grad():
        begin = 0
        for row, size in zip(thresholds.rows, thresholds.sizes, strict=True):
            # Written in place: shards are column ranges of one result, and copying them together would cost as much
            # as reading a good part of the weights.
            columns = slice(begin, begin + size)
            kept = sparsify(flat, row)
            if own_bias is None:
                torch.mm(kept, weight_t[:, columns], out=y[:, columns])
            else:
                torch.addmm(own_bias[columns], kept, weight_t[:, columns], out=y[:, columns])
            begin += size
    return y.view(*x.shape[:-1], out_features)
