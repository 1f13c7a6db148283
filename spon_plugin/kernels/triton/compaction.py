# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The compaction kernel: list the kept channels on the device, then gather exactly those weight rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from spon_plugin.kernels.triton.common import (
    FLOAT_OPTIONS,
    Problem,
    add_products,
    empty_sums,
    let_next_start,
    load_kept,
    load_rows,
    load_weight_rows,
    locate,
    nan_of_rows,
    store_sums,
)
from spon_plugin.kernels.triton.configs import Launch, next_power_of_two

CHUNK = 1024


def sparse_linear(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
    launch: Launch,
) -> Tensor:
    """``y = S(x) weight_t + bias`` in two launches, or three where the list is split.

    The first lists, per shard, the channels that some row keeps, in ascending order, and the rows' values there. The
    list is then divided evenly among the programs, so that the mask's shape cannot unbalance them. How long the list is
    stays on the device: no grid and no scratch depends on it, so the call can be captured in a CUDA graph.
    Deterministic, without atomics.

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
        channels, values, nans, counts = _lists(problem)
        sums, early_bias = problem.sums()
        _gather[problem.grid](
            channels,
            values,
            nans,
            counts,
            problem.weight_t,
            early_bias,
            sums,
            problem.rows,
            problem.in_features,
            nans.shape[1],
            CHUNKS=next_power_of_two(nans.shape[1]),
            **problem.constants(_gather),
        )
        return problem.finish(sums).view(*x.shape[:-1], -1)


def _lists(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """List the kept channels on the device, but for those that only a NaN keeps.

    Returns:
        Per shard the kept channels, int32 ``[shards, in_features]``; the rows' values there, ``[shards, rows,
        in_features]`` in `x.dtype`, zero where a row masks what another keeps; float32 ``[shards, chunks, rows]``, NaN
        where a row has one in that chunk of channels, else zero; and how long the lists are, int32 ``[shards]``. Beyond
        its length a list is uninitialised.
    """
    shards = len(problem.sizes)
    device = problem.x.device
    channels = torch.empty((shards, problem.in_features), dtype=torch.int32, device=device)
    values = torch.empty((shards, *problem.x.shape), dtype=problem.x.dtype, device=device)
    chunks = triton.cdiv(problem.in_features, CHUNK)
    nans = torch.empty((shards, chunks, problem.rows), dtype=torch.float32, device=device)
    counts = torch.empty(shards, dtype=torch.int32, device=device)
    _list_kept[(chunks, shards)](
        problem.x,
        problem.threshold,
        channels,
        values,
        nans,
        counts,
        problem.rows,
        problem.in_features,
        problem.x.stride(0),
        PER_CHANNEL=problem.per_channel,
        BLOCK_ROWS=problem.block_rows,
        BLOCK=CHUNK,
        num_warps=4 if problem.rows == 1 else 8,
        **FLOAT_OPTIONS,
    )
    return channels, values, nans, counts


@triton.jit
def _list_kept(
    x,
    threshold,
    kept_channels,
    kept_values,
    nans,
    counts,
    row_count,
    in_features,
    stride_row,
    PER_CHANNEL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """List the kept channels of one chunk, behind those of the chunks before it.

    Each program counts the earlier chunks itself: `x` is some kilobytes in the L2 cache, and reading it again is
    cheaper than a second launch or a chain of programs that wait for each other.
    """
    chunk = tl.program_id(0)
    shard = tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    earlier = tl.zeros([BLOCK], tl.int32)
    for start in range(0, chunk * BLOCK, BLOCK):
        _, active = load_kept(
            x, threshold, shard, start + lanes, row_count, in_features, stride_row, PER_CHANNEL, BLOCK_ROWS
        )
        earlier += active.to(tl.int32)
    before = tl.sum(earlier, axis=0)

    channels = chunk * BLOCK + lanes
    value, active = load_kept(
        x, threshold, shard, channels, row_count, in_features, stride_row, PER_CHANNEL, BLOCK_ROWS
    )
    ones = active.to(tl.int32)
    places = before + tl.cumsum(ones, axis=0) - ones
    tl.store(kept_channels + shard * in_features + places, channels, mask=active)
    lists = kept_values + shard * row_count * in_features
    flags = nans + (shard * tl.num_programs(0) + chunk) * row_count
    flag = nan_of_rows(value, BLOCK_ROWS)
    value = value.to(kept_values.dtype.element_ty)
    if BLOCK_ROWS == 1:
        tl.store(flags, flag)
        tl.store(lists + places, value, mask=active)
    else:
        rows = tl.arange(0, BLOCK_ROWS)
        tl.store(flags + rows, flag, mask=rows < row_count)
        within = (rows < row_count)[:, None] & active[None, :]
        tl.store(lists + rows[:, None] * in_features + places[None, :], value, mask=within)
    if chunk == tl.num_programs(0) - 1:
        tl.store(counts + shard, before + tl.sum(ones, axis=0))


@triton.jit
def _gather(
    kept_channels,
    kept_values,
    nans,
    counts,
    weight_t,
    bias,
    out,
    row_count,
    in_features,
    chunk_count,
    CHUNKS: tl.constexpr,
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
    """One block of columns over one of SPLITS equal parts of its shard's list."""
    let_next_start(DEPENDENT)
    split = tl.program_id(1)
    shard, first, end = locate(tl.program_id(0), SIZES, BLOCK_OUT, ALIGN)
    columns = first + tl.arange(0, BLOCK_OUT)
    count = tl.load(counts + shard)
    part = (count + SPLITS - 1) // SPLITS
    stop = tl.minimum((split + 1) * part, count)
    lists = kept_values + shard * row_count * in_features
    sums = empty_sums(BLOCK_ROWS, LANES, BLOCK_OUT)
    for start in tl.range(split * part, stop, BLOCK_IN, num_stages=STAGES):
        places = start + tl.arange(0, BLOCK_IN)
        listed = places < stop
        channels = tl.load(kept_channels + shard * in_features + places, mask=listed, other=0)
        value = load_rows(lists, in_features, row_count, places, listed, BLOCK_ROWS)
        weight = load_weight_rows(weight_t, channels, listed, columns, end, OUT)
        sums = add_products(sums, value, weight, BLOCK_ROWS, WIDEN)
    if split == 0:
        # Zeros, or what the lists leave out.
        chunks = tl.arange(0, CHUNKS)
        flags = nans + shard * chunk_count * row_count
        if BLOCK_ROWS == 1:
            sums += tl.sum(tl.load(flags + chunks, mask=chunks < chunk_count, other=0.0), axis=0)
        else:
            rows = tl.arange(0, BLOCK_ROWS)
            within = (rows < row_count)[:, None] & (chunks < chunk_count)[None, :]
            flag = tl.load(flags + chunks[None, :] * row_count + rows[:, None], mask=within, other=0.0)
            sums += tl.sum(flag, axis=1)[:, None]
    store_sums(sums, out, bias, split, row_count, columns, end, OUT, BLOCK_ROWS)
