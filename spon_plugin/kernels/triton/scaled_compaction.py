# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The compaction kernel for weights with scales: one row of x, and only the codes of kept channels are decoded.

Masked channels cost the dense-mask kernel (`scaled`) no bytes, but the instructions that make a number of a code, which
is what bounds it in eight bits and less. Here the kept channels of each block come first in a list, and a program ends
with the last of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from spon_plugin.kernels.triton.codes import listed_lane_sums, load_codes
from spon_plugin.kernels.triton.common import (
    FLOAT_OPTIONS,
    empty_sums,
    let_next_start,
    load_kept,
    locate,
    nan_of_rows,
    store_sums,
)
from spon_plugin.kernels.triton.configs import Launch, next_power_of_two
from spon_plugin.kernels.triton.scaled import ScaledProblem, add_scaled
from spon_plugin.weights.scaled import ScaledWeight

CHUNK = 1024


def sparse_linear(
    x: Tensor,
    weight: ScaledWeight,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
    launch: Launch,
) -> Tensor:
    """``y = S(x) W^T + bias`` for one row, in two launches, or three where the channels are split.

    The first lists, per shard and block of `launch.block_in` channels, those that the row keeps, in ascending order,
    with its values there. How long the lists are stays on the device, so the call can be captured in a CUDA graph.
    Deterministic, without atomics; otherwise as `scaled.sparse_linear`.

    Args:
        x: as in `reference.sparse_linear`, one row in all.
        weight: one that `launch.why_not` has nothing against.
        threshold: as in `reference.sparse_linear`.
        bias: likewise.
        shard_sizes: likewise; for int4 shards begin at even columns.
        launch: block sizes and splits (`configs.choose`); groups shorter than its blocks of channels shrink them.

    Returns:
        ``[..., out_features]`` in `x.dtype`.
    """
    problem = ScaledProblem.of_weight(x, weight, threshold, bias, shard_sizes, launch)
    with problem.on_device():
        channels, values, nans, counts = _lists(problem)
        sums, early_bias = problem.sums()
        _listed[problem.grid](
            channels,
            values,
            nans,
            counts,
            problem.weight_t,
            weight.scales,
            weight.zeros,
            weight.offsets,
            early_bias,
            sums,
            counts.shape[1],
            nans.shape[1],
            CHUNKS=next_power_of_two(nans.shape[1]),
            **problem.constants(_listed),
        )
        return problem.finish(sums).view(*x.shape[:-1], -1)


def _lists(problem: ScaledProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """List the kept channels of each block on the device, but for those that only a NaN keeps.

    Returns:
        Per shard the kept channels, each block's from its first place on, int32 ``[shards, blocks, block_in]``; the
        row's values there, in `x.dtype`; float32 ``[shards, chunks]``, NaN where the row has one in that chunk of
        channels, else zero; and how many a block keeps, int32 ``[shards, blocks]``. The rest of a block is
        uninitialised.
    """
    shards, block_in, device = len(problem.sizes), problem.launch.block_in, problem.x.device
    chunk = max(CHUNK, block_in)
    chunks = triton.cdiv(problem.in_features, chunk)
    blocks = chunks * chunk // block_in
    channels = torch.empty((shards, blocks, block_in), dtype=torch.int32, device=device)
    values = torch.empty((shards, blocks, block_in), dtype=problem.x.dtype, device=device)
    nans = torch.empty((shards, chunks), dtype=torch.float32, device=device)
    counts = torch.empty((shards, blocks), dtype=torch.int32, device=device)
    _list_blocks[(chunks, shards)](
        problem.x,
        problem.threshold,
        channels,
        values,
        nans,
        counts,
        problem.in_features,
        PER_CHANNEL=problem.per_channel,
        BLOCK_IN=block_in,
        CHUNK=chunk,
        num_warps=4,
        **FLOAT_OPTIONS,
    )
    return channels, values, nans, counts


@triton.jit
def _list_blocks(
    x,
    threshold,
    kept_channels,
    kept_values,
    nans,
    counts,
    in_features,
    PER_CHANNEL: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """List the kept channels of the blocks of one chunk."""
    BLOCKS: tl.constexpr = CHUNK // BLOCK_IN
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    channels = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    value, active = load_kept(x, threshold, tl.program_id(1), channels, 1, in_features, 0, PER_CHANNEL, 1)
    tl.store(nans + place, nan_of_rows(value, 1))
    ones = tl.reshape(active.to(tl.int32), [BLOCKS, BLOCK_IN])
    blocks = place * BLOCKS + tl.arange(0, BLOCKS)
    tl.store(counts + blocks, tl.sum(ones, axis=1))
    places = blocks[:, None] * BLOCK_IN + tl.cumsum(ones, axis=1) - ones
    tl.store(kept_channels + places, tl.reshape(channels, [BLOCKS, BLOCK_IN]), mask=ones > 0)
    value = tl.reshape(value.to(kept_values.dtype.element_ty), [BLOCKS, BLOCK_IN])
    tl.store(kept_values + places, value, mask=ones > 0)


@triton.jit
def _listed(
    kept_channels,
    kept_values,
    nans,
    counts,
    codes,
    scales,
    zeros,
    offsets,
    bias,
    out,
    block_count,
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
    FORMAT: tl.constexpr,
    MIDDLE: tl.constexpr,
    GROUP: tl.constexpr,
    ROW: tl.constexpr,
    SCALES: tl.constexpr,
    ZEROS: tl.constexpr,
    OFFSETS: tl.constexpr,
    SHARE: tl.constexpr,
    DTYPE: tl.constexpr,
    HOLD: tl.constexpr,
):
    """One block of columns over every SPLITS-th block of channels; arguments as in `scaled._scaled`."""
    let_next_start(DEPENDENT)
    split = tl.program_id(1)
    shard, first, end = locate(tl.program_id(0), SIZES, BLOCK_OUT, ALIGN)
    columns = first + tl.arange(0, BLOCK_OUT)
    inside = columns < end
    places = tl.arange(0, BLOCK_IN)
    sums = empty_sums(BLOCK_ROWS, LANES, BLOCK_OUT)
    for block in tl.range(split, block_count, SPLITS, num_stages=STAGES):
        at = shard * block_count + block
        count = tl.load(counts + at)
        listed = places < count
        channels = tl.load(kept_channels + at * BLOCK_IN + places, mask=listed, other=0)
        value = tl.load(kept_values + at * BLOCK_IN + places, mask=listed, other=0.0).to(tl.float32)
        loaded = load_codes(codes, channels, listed, first, end, SHARE, ROW, BLOCK_OUT, ALIGN)
        if HOLD:
            tl.debug_barrier()  # which no load passes
        part = listed_lane_sums(loaded, value, tl.zeros_like(sums), count, FORMAT, MIDDLE, LANES)
        sums = add_scaled(
            sums, part, value, scales, zeros, offsets, block * BLOCK_IN, columns, inside, count > 0,
            GROUP, SCALES, ZEROS, OFFSETS, LANES, BLOCK_ROWS,
        )  # fmt: skip
    if GROUP == 0:
        sums *= tl.load(scales + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if split == 0:
        # Zeros, or what the lists leave out.
        chunks = tl.arange(0, CHUNKS)
        sums += tl.sum(tl.load(nans + shard * chunk_count + chunks, mask=chunks < chunk_count, other=0.0), axis=0)
    store_sums(sums, out, bias, split, 1, columns, end, OUT, BLOCK_ROWS)
