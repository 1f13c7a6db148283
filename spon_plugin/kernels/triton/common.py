# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the Triton kernels share: the masking rule, where a program works, how it adds up, and the last stage.

Importing this module imports Triton. Names inside kernels: a *row* is a token (a row of `x`), a *channel* an input
feature (a row of `weight_t`), a *column* an output feature. With shards of different thresholds, a program's columns
lie in one shard, so that one mask serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from spon_plugin.errors import SponError
from spon_plugin.kernels.arguments import Thresholds, check_arguments
from spon_plugin.kernels.few_rows import GPU_ROWS
from spon_plugin.kernels.triton.configs import DTYPES, Launch, next_power_of_two

# Said, because the default changes between versions of Triton, and with it the last bit.
FLOAT_OPTIONS = {"enable_fp_fusion": True}
# Entries of a tile of partial sums: 64 registers a thread.
REDUCE_TILE = 8192


@triton.jit
def locate(block, SIZES: tl.constexpr, BLOCK_OUT: tl.constexpr, ALIGN: tl.constexpr):
    """The shard that a block of columns lies in, its first column, and where that shard ends.

    Args:
        block: which block, counted over the shards; every shard starts a new one.
        SIZES: tuple, the widths of the shards.
        BLOCK_OUT: columns of a block.
        ALIGN: divides every width and BLOCK_OUT; lets the compiler see that vector loads are aligned.
    """
    shard = 0
    first = block * BLOCK_OUT
    end = SIZES[0]
    begin = SIZES[0]
    blocks = (SIZES[0] + BLOCK_OUT - 1) // BLOCK_OUT
    for later in tl.static_range(1, len(SIZES)):
        reached = block >= blocks
        shard = tl.where(reached, later, shard)
        first = tl.where(reached, begin + (block - blocks) * BLOCK_OUT, first)
        begin += SIZES[later]
        end = tl.where(reached, begin, end)
        blocks += (SIZES[later] + BLOCK_OUT - 1) // BLOCK_OUT
    return shard, tl.multiple_of(first, ALIGN), end


@triton.jit
def load_rows(pointer, stride_row, row_count, places, inside, BLOCK_ROWS: tl.constexpr):
    """Load float32 ``[BLOCK_ROWS, C]``, or ``[C]`` for one row: entries `places` of every row, zero where not `inside`.

    One row has no second dimension on purpose: its values then need not move between threads to meet their weights.
    """
    if BLOCK_ROWS == 1:
        value = tl.load(pointer + places, mask=inside, other=0.0, eviction_policy="evict_last")
    else:
        rows = tl.arange(0, BLOCK_ROWS)
        value = tl.load(
            pointer + rows[:, None] * stride_row + places[None, :],
            mask=(rows < row_count)[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_last",
        )
    return value.to(tl.float32)


@triton.jit
def load_kept(
    x,
    threshold,
    shard,
    channels,
    row_count,
    in_features,
    stride_row,
    PER_CHANNEL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Load `x` at some channels and apply the masking rule of `masking.keep_mask`.

    `x` points to ``[row_count, in_features]``, rows `stride_row` apart; `threshold` to float32 ``[shards]`` or, if
    PER_CHANNEL, ``[shards, in_features]``; `channels` is int32 ``[C]``, at or beyond in_features for none.

    Returns:
        float32 values as from `load_rows`, zero where masked, and bool ``[C]``, whether the channel's weights are
        wanted: a row keeps it, and not as NaN. What a NaN is multiplied with does not matter, so that a row of NaN,
        such as padding may be, shows in its own outputs but makes nothing be read.
    """
    inside = channels < in_features
    value = load_rows(x, stride_row, row_count, channels, inside, BLOCK_ROWS)
    if PER_CHANNEL:
        limit = tl.load(threshold + shard * in_features + channels, mask=inside, other=0.0)
    else:
        limit = tl.load(threshold + shard)
    if BLOCK_ROWS > 1:
        if PER_CHANNEL:
            limit = limit[None, :]
        inside = inside[None, :] & (tl.arange(0, BLOCK_ROWS) < row_count)[:, None]
    # Both are false for NaN. What lies beyond the matrix is zero, and wanted by no row, however low the threshold.
    magnitude = tl.abs(value)
    active = inside & (magnitude > limit)
    value = tl.where(magnitude <= limit, 0.0, value)
    if BLOCK_ROWS > 1:
        active = tl.max(active.to(tl.int32), axis=0) > 0
    return value, active


@triton.jit
def nan_of_rows(value, BLOCK_ROWS: tl.constexpr):
    """float32 ``[R]``, or a number for one row: NaN where a row of `value` has one, else zero."""
    return tl.sum(tl.where(value != value, value, 0.0), axis=0 if BLOCK_ROWS == 1 else 1)


@triton.jit
def load_weight_rows(weight_t, channels, active, columns, end, OUT: tl.constexpr):
    """Load ``[C, BLOCK_OUT]`` of `weight_t`; the rows that are not `active` are not read and come as zeros."""
    # 64 bits per row, not per element: a matrix may have more than 2^31 entries.
    starts = weight_t + channels.to(tl.int64) * OUT
    return tl.load(
        starts[:, None] + columns[None, :],
        mask=active[:, None] & (columns < end)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def empty_sums(BLOCK_ROWS: tl.constexpr, LANES: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """The float32 accumulator: LANES per column for one row, per row and column for several."""
    return tl.zeros([LANES if BLOCK_ROWS == 1 else BLOCK_ROWS, BLOCK_OUT], tl.float32)


@triton.jit
def add_products(sums, value, weight, BLOCK_ROWS: tl.constexpr, WIDEN: tl.constexpr):
    """Add `value`, ``[R, C]`` or ``[C]``, times `weight` ``[C, BLOCK_OUT]`` to the accumulator.

    One row is multiplied in place: a thread adds up the channels that it loaded itself, LANES apart, and threads are
    summed over only once, at the end. Several rows go through the tensor cores, whose float32 sums of exact products
    serve bfloat16 and float16 alike. float32 stays float32 (no TF32).
    """
    if BLOCK_ROWS == 1:
        products = value[:, None] * weight.to(tl.float32)
        sums += tl.sum(tl.reshape(products, [weight.shape[0] // sums.shape[0], sums.shape[0], sums.shape[1]]), axis=0)
    elif WIDEN:
        sums = tl.dot(value, weight.to(tl.float32), sums, input_precision="ieee")
    else:
        sums = tl.dot(value.to(weight.dtype), weight, sums)
    return sums


@triton.jit
def store_sums(sums, out, bias, split, row_count, columns, end, OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Store the block into `out` ``[splits, row_count, OUT]``, with the bias where there is one.

    With one split `out` is the result itself; with several it holds float32 partial sums, and the bias comes last.
    """
    if BLOCK_ROWS == 1:
        sums = tl.sum(sums, axis=0)[None, :]
    inside = columns < end
    if bias is not None:
        sums += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    rows = tl.arange(0, BLOCK_ROWS)
    places = (split * row_count + rows).to(tl.int64) * OUT
    tl.store(
        out + places[:, None] + columns[None, :],
        sums.to(out.dtype.element_ty),
        mask=(rows < row_count)[:, None] & inside[None, :],
    )


@triton.jit
def let_next_start(DEPENDENT: tl.constexpr):
    """Allow the launch that sums up to start before this one ends; it waits for the sums itself."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _reduce(
    partial,
    bias,
    y,
    row_count,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """``y[row] = sum over splits of partial[split, row] + bias``, always in the same order."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    splits = tl.arange(0, PADDED)
    inside = columns < OUT
    places = (splits * row_count + row).to(tl.int64) * OUT
    terms = tl.load(
        partial + places[:, None] + columns[None, :], mask=(splits < SPLITS)[:, None] & inside[None, :], other=0.0
    )
    total = tl.sum(terms, axis=0)
    if bias is not None:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row.to(tl.int64) * OUT + columns, total.to(y.dtype.element_ty), mask=inside)


@lru_cache(maxsize=64)
def capability(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability; ``(0, 0)`` of anything else."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def starts_early(device: torch.device) -> bool:
    """Whether a launch may start before the one that it depends on ends (programmatic dependent launch, Hopper's)."""
    return torch.version.hip is None and capability(device) >= (9, 0)


@lru_cache(maxsize=4096)
def fitted(launch: Launch, in_features: int, sizes: tuple[int, ...], device: torch.device) -> Launch:
    """The launch for a shape on a device; where Triton interprets the kernels, a device of one multiprocessor."""
    cuda = device.type == "cuda"
    count = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
    return launch.fitted(in_features, sizes, count)


@dataclass(frozen=True)
class Problem:
    """Arguments of `sparse_linear`, checked and laid out as the kernels want them.

    Attributes:
        x: ``[rows, in_features]``, contiguous along channels.
        weight_t: ``[in_features, out_features]``, contiguous.
        threshold: float32 ``[shards]`` or ``[shards, in_features]``, contiguous.
        per_channel: which of the two.
        sizes: the widths of the shards.
        bias: ``[out_features]`` or None.
        y: ``[rows, out_features]``, to be written.
        launch: block sizes and splits, fitted to the shape.
    """

    x: Tensor
    weight_t: Tensor
    threshold: Tensor
    per_channel: bool
    sizes: tuple[int, ...]
    bias: Tensor | None
    y: Tensor
    launch: Launch

    @staticmethod
    def of(
        x: Tensor,
        weight_t: Tensor,
        threshold: Tensor,
        bias: Tensor | None,
        shard_sizes: Sequence[int] | None,
        launch: Launch,
    ) -> Problem:
        """Check and lay out; arguments as in `reference.sparse_linear`.

        Raises:
            SponError: arguments that do not fit each other, a dtype other than float32, bfloat16 and float16, more
                than `GPU_ROWS` rows, or nothing to compute.
        """
        check_arguments(x, weight_t, bias)
        if x.dtype not in DTYPES.values():
            raise SponError.of("x", x.dtype, "float32, bfloat16 or float16", "Use reference.sparse_linear for others.")
        in_features, out_features = weight_t.shape
        flat = x.reshape(-1, in_features) if x.numel() else x.new_empty(0, in_features)
        rows = flat.shape[0]
        if not 0 < rows <= GPU_ROWS or not out_features:
            raise SponError.of(
                "x", f"{rows} rows, {out_features} outputs", f"1 to {GPU_ROWS} rows and an output", "Use sparse_linear."
            )
        thresholds = Thresholds.of(threshold, weight_t, shard_sizes)
        return Problem(
            x=flat if flat.stride(1) == 1 or in_features == 1 else flat.contiguous(),
            weight_t=weight_t,
            threshold=threshold.contiguous(),
            per_channel=thresholds.rows[0].numel() > 1,
            sizes=tuple(thresholds.sizes),
            bias=None if bias is None else bias.contiguous(),
            y=x.new_empty((rows, out_features)),
            launch=fitted(launch, in_features, tuple(thresholds.sizes), x.device),
        )

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.x.shape[0]

    @property
    def in_features(self) -> int:
        """The number of channels."""
        return self.x.shape[1]

    @property
    def block_rows(self) -> int:
        """Rows of a tile: one, or what a tensor core multiplies at least."""
        return 1 if self.rows == 1 else 16

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of columns times splits of the channels."""
        return self.launch.grid(self.sizes), self.splits

    @property
    def splits(self) -> int:
        """Programs that share the channels of a block of columns."""
        assert self.launch.splits is not None  # `fitted` gave a number
        return self.launch.splits

    @property
    def dependent(self) -> bool:
        """Whether a launch that sums up follows, and may start early."""
        return self.splits > 1 and starts_early(self.x.device)

    @property
    def lanes(self) -> int:
        """Channels that the threads of a program load at once, sixteen bytes each; one thread has every lanes-th."""
        threads = self.launch.num_warps * 32
        return max(1, min(self.launch.block_in, threads * self.columns_of_a_load // self.launch.block_out))

    @property
    def columns_of_a_load(self) -> int:
        """Columns in sixteen bytes of weights."""
        return 16 // self.weight_t.element_size()

    def constants(self, kernel: Any) -> dict[str, Any]:
        """The compile-time arguments that both kernels take."""
        return {
            "SIZES": self.sizes,
            "OUT": self.y.shape[1],
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_IN": self.launch.block_in,
            "BLOCK_OUT": self.launch.block_out,
            "LANES": self.lanes,
            "SPLITS": self.splits,
            "ALIGN": math.gcd(self.launch.block_out, *self.sizes),
            # Triton's interpreter multiplies the bit patterns of bfloat16; widening changes no product.
            "WIDEN": self.x.dtype == torch.float32 or isinstance(kernel, InterpretedFunction),
            "num_warps": self.launch.num_warps,
            "num_stages": self.launch.num_stages,
            "DEPENDENT": self.dependent,
            # Said to the loop, without which the compiler copies ahead for tensor cores alone.
            "STAGES": self.launch.num_stages if self.rows == 1 and self.launch.num_stages > 1 else None,
            # An option of NVIDIA's compiler alone.
            **({} if torch.version.hip else {"maxnreg": self.launch.maxnreg}),
            **FLOAT_OPTIONS,
        }

    def on_device(self) -> Any:
        """Context in which Triton launches on the device of `x`."""
        if self.x.device.type != "cuda" or self.x.device.index == torch.cuda.current_device():
            return nullcontext()
        return torch.cuda.device(self.x.device)

    def sums(self) -> tuple[Tensor, Tensor | None]:
        """Where the main kernel writes, and the bias that it adds: the result, or partial sums without a bias."""
        if self.splits == 1:
            return self.y, self.bias
        shape = (self.splits, *self.y.shape)
        return torch.empty(shape, dtype=torch.float32, device=self.x.device), None

    def finish(self, sums: Tensor) -> Tensor:
        """Add up the partial sums, if they are partial, in a fixed order; returns ``[rows, out_features]``."""
        if self.splits == 1:
            return self.y
        rows, out_features = self.y.shape
        padded = next_power_of_two(self.splits)
        block = min(256, REDUCE_TILE // padded)
        _reduce[(triton.cdiv(out_features, block), rows)](
            sums,
            self.bias,
            self.y,
            rows,
            SPLITS=self.splits,
            PADDED=padded,
            OUT=out_features,
            BLOCK=block,
            DEPENDENT=self.dependent,
            num_warps=4,
            **({"launch_pdl": True} if self.dependent else {}),
            **FLOAT_OPTIONS,
        )
        return self.y
