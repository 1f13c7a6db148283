# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The dense-mask kernel for weights with scales (int8, int4, FP8): codes of masked channels are not read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spon_plugin.kernels.arguments import Thresholds
from spon_plugin.kernels.triton.codes import lane_sums, load_codes, numbers
from spon_plugin.kernels.triton.common import (
    Problem,
    add_products,
    capability,
    empty_sums,
    fitted,
    let_next_start,
    load_kept,
    locate,
    store_sums,
)
from spon_plugin.kernels.triton.configs import Launch
from spon_plugin.weights.scaled import ScaledWeight

# Compute capability from which Triton converts e4m3.
CONVERTS_FP8 = (8, 9)
# Before Triton 3.8, ptxas (CUDA 12.8) puts some loads of codes next to their use: three to five of a thread's eight are
# in flight. e4m3 that the GPU converts is not concerned, nor are copies, which a barrier would keep from going ahead.
SPREADS_LOADS = torch.version.hip is None and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
# There ptxas for this capability and later ones moves the uses of integer codes before the barrier.
PASSES_BARRIERS = (10, 0)
STAGES_AHEAD = 3
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def sparse_linear(
    x: Tensor,
    weight: ScaledWeight,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
    launch: Launch,
) -> Tensor:
    """``y = S(x) W^T + bias`` in one launch, or two where the channels are split.

    As `dense_mask.sparse_linear`, on codes: inputs are multiplied as they are and summed in float32, and a scale
    multiplies the sum over its group, or over all channels where there is one group. The scales of a group are not read
    where all its channels are masked.

    Args:
        x: as in `reference.sparse_linear`, at most `GPU_ROWS` rows in all.
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
        sums, early_bias = problem.sums()
        _scaled[problem.grid](
            problem.x,
            problem.weight_t,
            weight.scales,
            weight.zeros,
            weight.offsets,
            problem.threshold,
            early_bias,
            sums,
            problem.rows,
            problem.in_features,
            problem.x.stride(0),
            PER_CHANNEL=problem.per_channel,
            **problem.constants(_scaled),
        )
        return problem.finish(sums).view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class ScaledProblem(Problem):
    """`Problem` with bytes of codes in the place of `weight_t`, and the weight that they belong to."""

    weight: ScaledWeight

    @staticmethod
    def of_weight(
        x: Tensor,
        weight: ScaledWeight,
        threshold: Tensor,
        bias: Tensor | None,
        shard_sizes: Sequence[int] | None,
        launch: Launch,
    ) -> ScaledProblem:
        """Lay out; arguments as in `sparse_linear`, checked."""
        in_features, out_features = weight.in_features, weight.out_features
        flat = x.reshape(-1, in_features)
        thresholds = Thresholds.of(threshold, weight.codes, shard_sizes, out_features)
        sizes = tuple(thresholds.sizes)
        launch = copied_ahead(within_groups(launch, weight), weight, flat.shape[0], x.device)
        return ScaledProblem(
            x=flat if flat.stride(1) == 1 or in_features == 1 else flat.contiguous(),
            weight_t=elements(weight, thresholds.sizes, bytewise=converts_fp8(x.device) and flat.shape[0] == 1),
            threshold=threshold.contiguous(),
            per_channel=thresholds.rows[0].numel() > 1,
            sizes=sizes,
            bias=None if bias is None else bias.contiguous(),
            y=x.new_empty((flat.shape[0], out_features)),
            launch=fitted(launch, in_features, sizes, x.device),
            weight=weight,
        )

    @property
    def columns_of_a_load(self) -> int:
        """See `Problem.columns_of_a_load`."""
        return 16 * self.weight.unit

    def constants(self, kernel: Any) -> dict[str, Any]:
        """See `Problem.constants`."""
        weight, bare = self.weight, self.weight.zeros is None and self.weight.offsets is None
        one_group = weight.scales.shape[0] == 1
        constants = super().constants(kernel)
        dtype = self.x.dtype if self.rows > 1 and not constants["WIDEN"] else torch.float32
        return {
            **constants,
            "FORMAT": self._format,
            "MIDDLE": weight.middle if weight.zeros is None else 0,
            "GROUP": 0 if one_group and bare else self.in_features if one_group else weight.group_size,
            "ROW": self.weight_t.stride(0),
            "SCALES": weight.scales.stride(0),
            "ZEROS": 0 if weight.zeros is None else weight.zeros.stride(0),
            "OFFSETS": 0 if weight.offsets is None else weight.offsets.stride(0),
            "SHARE": self.weight_t.element_size() * weight.unit,
            "DTYPE": TRITON_DTYPES[dtype],
            "HOLD": SPREADS_LOADS and self.rows == 1 and constants["STAGES"] is None and self._format != "fp8",
        }

    @property
    def _format(self) -> str:
        if self.weight_t.dtype == torch.int32:
            return f"{self.weight.format} words"
        if self.weight.format != "fp8" or (self.rows == 1 and converts_fp8(self.x.device)):
            return self.weight.format
        return "fp8 bits"


def elements(weight: ScaledWeight, sizes: Sequence[int], bytewise: bool) -> Tensor:
    """The codes as the kernel loads them, in the same memory: int32 where every shard of every row begins at one.

    Args:
        weight: the codes' weight.
        sizes: widths of the shards.
        bytewise: whether e4m3 comes as uint8, for the GPU to convert: for one row, as the tiles that tensor cores want
            would be copied in small pieces.
    """
    codes, step = weight.codes, 4 * weight.unit
    aligned = not codes.data_ptr() % 4 and not codes.stride(0) % 4 and not any(size % step for size in sizes)
    return codes.view(torch.int32 if aligned and not (bytewise and weight.format == "fp8") else torch.uint8)


def converts_fp8(device: torch.device) -> bool:
    """Whether Triton has e4m3 on a device; elsewhere the kernel takes its bits apart."""
    return capability(device) >= CONVERTS_FP8


def within_groups(launch: Launch, weight: ScaledWeight) -> Launch:
    """`launch` with blocks of channels that lie in one group: fewer warps have as many loads a thread."""
    if weight.scales.shape[0] == 1:
        return launch
    while weight.group_size % launch.block_in:
        warps = max(1, launch.num_warps // 2)
        resident = launch.resident * launch.num_warps // warps
        launch = replace(launch, block_in=launch.block_in // 2, num_warps=warps, resident=resident)
    return launch


def copied_ahead(launch: Launch, weight: ScaledWeight, rows: int, device: torch.device) -> Launch:
    """`launch` with codes of one row copied ahead, where `SPREADS_LOADS` and a barrier does not help."""
    if not SPREADS_LOADS or rows > 1 or launch.num_stages > 1:
        return launch
    spreads = not converts_fp8(device) if weight.format == "fp8" else capability(device) >= PASSES_BARRIERS
    return replace(launch, num_stages=STAGES_AHEAD) if spreads else launch


@triton.jit
def sums_of_inputs(value, LANES: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """float32: the inputs of a block summed for each row of the accumulator (`empty_sums`)."""
    if BLOCK_ROWS == 1:
        return tl.sum(tl.reshape(value, [value.shape[0] // LANES, LANES]), axis=0)
    else:
        return tl.sum(value, axis=1)


@triton.jit
def add_scaled(
    sums,
    part,
    value,
    scales,
    zeros,
    offsets,
    start,
    columns,
    inside,
    kept,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    ZEROS: tl.constexpr,
    OFFSETS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """`sums` plus ``s_g (part - z_g sum v) + o_g sum v``; plus `part` where GROUP is 0 and one scale comes at the end.

    Args:
        sums: the accumulator.
        part: a block's products with codes, of the same shape.
        value: the block's inputs.
        scales: of the groups, with SCALES elements from one to the next.
        zeros: likewise, or None.
        offsets: likewise, or None.
        start: the block's first channel.
        columns: int32 ``[BLOCK_OUT]``.
        inside: which of them there are.
        kept: whether the block has a kept channel; what its group has is not read without one.
        GROUP: channels of a group.
        SCALES: see `scales`.
        ZEROS: likewise.
        OFFSETS: likewise.
        LANES: of the accumulator.
        BLOCK_ROWS: rows of x.
    """
    if GROUP:
        group = start // GROUP  # times outputs, far from 2^31
        wanted = inside.to(tl.int32) * kept.to(tl.int32) > 0
        scale = tl.load(scales + group * SCALES + columns, mask=wanted, other=0.0).to(tl.float32)
        if zeros is not None or offsets is not None:
            total = sums_of_inputs(value, LANES, BLOCK_ROWS)[:, None]
        if zeros is not None:
            zero = tl.load(zeros + group * ZEROS + columns, mask=wanted, other=0).to(tl.float32)
            part -= total * zero[None, :]
        part *= scale[None, :]
        if offsets is not None:
            offset = tl.load(offsets + group * OFFSETS + columns, mask=wanted, other=0.0).to(tl.float32)
            part += total * offset[None, :]
    return sums + part


@triton.jit
def _scaled(
    x,
    codes,
    scales,
    zeros,
    offsets,
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
    """One block of columns over every SPLITS-th block of channels, each within a group of GROUP, or 0 for one scale."""
    let_next_start(DEPENDENT)
    split = tl.program_id(1)
    shard, first, end = locate(tl.program_id(0), SIZES, BLOCK_OUT, ALIGN)
    columns = first + tl.arange(0, BLOCK_OUT)
    inside = columns < end
    sums = empty_sums(BLOCK_ROWS, LANES, BLOCK_OUT)
    for start in tl.range(split * BLOCK_IN, in_features, SPLITS * BLOCK_IN, num_stages=STAGES):
        channels = start + tl.arange(0, BLOCK_IN)
        value, active = load_kept(
            x, threshold, shard, channels, row_count, in_features, stride_row, PER_CHANNEL, BLOCK_ROWS
        )
        loaded = load_codes(codes, channels, active, first, end, SHARE, ROW, BLOCK_OUT, ALIGN)
        if HOLD:
            tl.debug_barrier()  # which no load passes
        if BLOCK_ROWS == 1:
            part = lane_sums(loaded, value, None, FORMAT, MIDDLE, LANES)
        else:
            part = add_products(tl.zeros_like(sums), value, numbers(loaded, FORMAT, MIDDLE, DTYPE), BLOCK_ROWS, WIDEN)
        sums = add_scaled(
            sums, part, value, scales, zeros, offsets, start, columns, inside, tl.max(active.to(tl.int32), axis=0) > 0,
            GROUP, SCALES, ZEROS, OFFSETS, LANES, BLOCK_ROWS,
        )  # fmt: skip
    if GROUP == 0:
        sums *= tl.load(scales + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    store_sums(sums, out, bias, split, row_count, columns, end, OUT, BLOCK_ROWS)
