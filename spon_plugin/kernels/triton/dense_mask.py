# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The dense-mask kernel: walk over all channels, and load only the weight rows that some row of `x` keeps."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from spon_plugin.kernels.triton.common import (
    Problem,
    add_products,
    empty_sums,
    let_next_start,
    load_kept,
    load_weight_rows,
    locate,
    store_sums,
)
from spon_plugin.kernels.triton.configs import Launch


def sparse_linear(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
    launch: Launch,
) -> Tensor:
    """``y = S(x) weight_t + bias`` in one launch, or two where the channels are split.

    The mask is computed where it is needed, so nothing but partial sums is written, but a tile of weights has holes.
    Deterministic, without atomics; shapes of the scratch depend on no data.

    Args:
        x: as in `reference.sparse_linear`, at most `GPU_ROWS` rows in all.
        weight_t: likewise.
        threshold: likewise.
        bias: likewise.
        shard_sizes: likewise.
        launch: block sizes and splits (`configs.choose`).

    Returns:
        ``[..., out_features]`` in `x.dtype`.

    Raises:
        SponError: see `Problem.of`.
    """
    problem = Problem.of(x, weight_t, threshold, bias, shard_sizes, launch)
    with problem.on_device():
        sums, early_bias = problem.sums()
        _dense_mask[problem.grid](
            problem.x,
            problem.weight_t,
            problem.threshold,
            early_bias,
            sums,
            problem.rows,
            problem.in_features,
            problem.x.stride(0),
            PER_CHANNEL=problem.per_channel,
            **problem.constants(_dense_mask),
        )
        return problem.finish(sums).view(*x.shape[:-1], -1)


@triton.jit
def _dense_mask(
    x,
    weight_t,
    threshold,
    bias,
    out,
    row_count,
    in_features,
    stride_row,
    PER_CHANNEL: tl.constexpr,
    SIZES: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    LANES: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of columns over every SPLITS-th block of channels.

    Splits interleave, because kept channels cluster: contiguous ranges would leave some programs with more work.
    """
    let_next_start(DEPENDENT)
    split = tl.program_id(1)
    shard, first, end = locate(tl.program_id(0), SIZES, BLOCK_OUT, ALIGN)
    columns = first + tl.arange(0, BLOCK_OUT)
    sums = empty_sums(BLOCK_ROWS, LANES, BLOCK_OUT)
    for start in tl.range(split * BLOCK_IN, in_features, SPLITS * BLOCK_IN, num_stages=STAGES):
        channels = start + tl.arange(0, BLOCK_IN)
        value, active = load_kept(
            x, threshold, shard, channels, row_count, in_features, stride_row, PER_CHANNEL, BLOCK_ROWS
        )
        weight = load_weight_rows(weight_t, channels, active, columns, end, OUT)
        sums = add_products(sums, value, weight, BLOCK_ROWS, WIDEN)
    store_sums(sums, out, bias, split, row_count, columns, end, OUT, BLOCK_ROWS)
