# SPDX-License-Identifier: Apache-2.0
"""`sparse_linear` on a CPU for weights with scales (int8, int4, FP8): few rows, skipped inputs are skipped bytes."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spon_plugin.kernels.arguments import Thresholds
from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.kernels.cpu import scaled_layout as layout
from spon_plugin.kernels.cpu.scaled_layout import (
    CALL_FIELDS,
    LAYER_FIELDS,
    SUM_FP8,
    SUM_INT4_EXACT,
    SUM_INT8,
    VECTORS,
    WEIGHT_FIELDS,
)
from spon_plugin.weights.scaled import ScaledWeight

KINDS = {
    torch.float32: layout.FLOAT32,
    torch.bfloat16: layout.BFLOAT16,
    torch.float16: layout.FLOAT16,
    torch.int8: layout.INT8,
    torch.uint8: layout.UINT8,
    torch.int16: layout.INT16,
    torch.int32: layout.INT32,
}
_TILE = 2048  # bytes of a row that are summed at once
_LONGEST = 8192  # of one row of x, where the rows of codes in flight are read from end to end
_CALL, _WEIGHT = struct.Struct(f"{len(CALL_FIELDS)}q"), struct.Struct(f"{len(WEIGHT_FIELDS)}q")
_LAYER = struct.Struct(f"{len(LAYER_FIELDS)}q")


def why_not(weight: ScaledWeight) -> str:
    """The reason why the kernel does not read `weight` as it lies; empty where it does."""
    if not cpu.is_available():
        return "Numba or GNU's OpenMP is missing"
    if weight.codes.dtype != weight.code_dtype:
        return f"{weight.format} codes of {weight.codes.dtype}"
    for name in ("codes", "scales", "zeros", "offsets"):
        part = getattr(weight, name)
        if part is None:
            continue
        if not part.is_cpu:
            return f"{name} on {part.device}"
        if name != "codes" and (part.dtype not in KINDS or (name == "scales" and not part.is_floating_point())):
            return f"{name} of {part.dtype}"
        if part.stride(1) != 1:
            return f"{name} that do not lie by inputs: call arranged() once"
    groups = weight.group_of_row
    if groups is not None and not (groups.is_cpu and groups.dtype == torch.int32 and groups.is_contiguous()):
        return "group_of_row that is no contiguous int32 on the CPU"
    return ""


@functools.cache
def _worker(kind: str) -> tuple[Any, int]:
    """The compiled thread function and its address; the first call compiles it, or loads it from Numba's cache."""
    from spon_plugin.kernels.cpu import numba_types
    from spon_plugin.kernels.cpu.scaled_worker import compile_scaled_worker

    compiled = compile_scaled_worker(kind, numba_types.INT8 if kind == SUM_INT8 else numba_types.FLOAT8)
    return compiled, compiled.address


def sums_of(weight: ScaledWeight) -> str:
    """How the codes of `weight` are summed on this processor, of `scaled_layout`."""
    from spon_plugin.kernels.cpu.processor import int4_sums

    return int4_sums() if weight.format == "int4" else weight.format


def sparse_linear(
    x: Tensor,
    weight: ScaledWeight,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
    exact: bool = False,
    integers: str | None = None,
) -> Tensor:
    """``y = S(x) W^T + bias`` for few rows; every row of codes that the mask of some row of x keeps is read once.

    Sums are float32, in an order that depends on the number of threads alone: the same call gives the same bits. Four
    bits are summed in integers, on the kept inputs rounded to eight bits, `scaled_layout.ROWS` of which
    share a step: an output is off by about 0.5% of its usual size. An input that is no finite number then makes its
    whole row of y NaN.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16.
        weight: one without a reason `why_not`.
        threshold: as in `reference.sparse_linear`.
        bias: likewise.
        shard_sizes: likewise; even, but for the last, with four bits.
        exact: sum four bits in float32, on the inputs as they are.
        integers: sum four bits so, of `scaled_layout.INTEGERS`, instead of by this processor's best instruction; all
            but AVX2's run anywhere.

    Returns:
        ``[..., out_features]`` in `x.dtype`.
    """
    prepared = Prepared(weight, threshold, bias, shard_sizes=shard_sizes, exact=exact, integers=integers)
    return prepared(x)


class Prepared:
    """`sparse_linear` with all of its arguments but x, whose addresses are kept: the caller keeps the tensors alive.

    Args:
        weight: as in `sparse_linear`, like the rest.
        threshold: likewise.
        bias: likewise.
        shard_sizes: likewise.
        exact: likewise.
        integers: likewise.

    Attributes:
        in_features: length of an input.
        out_features: length of an output.
    """

    __slots__ = ("_copies", "_groups", "_kind", "_settled", "_shards", "_unit", "in_features", "out_features")

    def __init__(
        self,
        weight: ScaledWeight,
        threshold: Tensor,
        bias: Tensor | None = None,
        *,
        shard_sizes: Sequence[int] | None = None,
        exact: bool = False,
        integers: str | None = None,
    ) -> None:
        kind = weight.format
        if kind == "int4":
            kind = SUM_INT4_EXACT if exact else integers or sums_of(weight)
        self.in_features, self.out_features = weight.in_features, weight.out_features
        groups = weight.scales.shape[0]
        self._kind, self._unit, self._groups = kind, weight.unit, groups
        bias = None if bias is None else bias.contiguous()
        thresholds = Thresholds.of(threshold, weight.codes, shard_sizes, self.out_features)
        taus = [tau.contiguous() for tau in thresholds.rows]
        self._copies = (taus, bias)  # where they were not contiguous
        # A shard's first output and width, and the words of its weight.
        self._shards: list[tuple[int, int, bytes]] = []
        first = 0
        for tau, width in zip(taus, thresholds.sizes, strict=True):
            layer = _LAYER.pack(tau.data_ptr(), int(tau.numel() > 1), *part_words(bias, first)[:2], self.out_features)
            words = weight_words(weight, first, width) + layer
            self._shards.append((first, width, words))
            first += width
        self._settled: dict[tuple[torch.Size, torch.dtype], _Settled] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """The output for a CPU tensor x ``[..., in_features]`` with a row at least."""
        settled = self._settled.get((x.shape, x.dtype)) or self._settle(x)
        x, y = x.contiguous(), torch.empty_like(settled.like)
        source, target, threads = x.data_ptr(), y.data_ptr(), torch.get_num_threads()
        worker, run = _worker(self._kind)[1], cpu.parallel()
        for offset, words, tile, sums, per_thread in settled.shards:
            scratch = cpu.scratch(_scratch_size(threads, sums, per_thread))
            shared = (scratch.data_ptr(), cpu.barrier())
            call = _CALL.pack(source, settled.kind, target + offset, settled.batch, tile, per_thread, *shared)
            run(worker, call + words, threads, 0)
        return y

    def scratch_words(self, x: Tensor, threads: int) -> int:
        """Words of 4 bytes of the scratch of a `stage`."""
        return max(_scratch_size(threads, *each[-2:]) for each in self._settle(x).shards)

    def stage(self, x: Tensor, y: Tensor, scratch: Tensor) -> cpu.Stage:
        """The call for one row x ``[in_features]``, the result of which is y; all contiguous. It has one shard."""
        settled = self._settle(x)
        ((offset, words, tile, _, per_thread),) = settled.shards
        target, shared = y.data_ptr() + offset, (scratch.data_ptr(), cpu.barrier_of_programs())
        call = _CALL.pack(x.data_ptr(), settled.kind, target, settled.batch, tile, per_thread, *shared)
        return cpu.Stage(_worker(self._kind)[1], call + words)

    def _settle(self, x: Tensor) -> _Settled:
        batch, shards = x.numel() // self.in_features, []
        for first, width, words in self._shards:
            tile = max(1, -(-width // self._unit))
            if batch > 1 or self._kind not in (SUM_INT8, SUM_FP8, *VECTORS):
                tile = min(tile, _TILE)
            elif self._groups > 1:  # sums leave the first cache, and where a group ends they are read once more
                tile = min(tile, _LONGEST)
            per_thread = layout.scratch_parts(batch, self.in_features, self._groups, tile * self._unit)[-1]
            shards.append((first * x.element_size(), words, tile, batch * width, per_thread))
        like = _like((*x.shape[:-1], self.out_features), x.dtype)
        settled = self._settled[x.shape, x.dtype] = _Settled(batch, KINDS[x.dtype], like, shards)
        return settled


def _scratch_size(threads: int, sums: int, per_thread: int) -> int:
    """Words of all threads: their sums, up to a cache line, and what each has of its own."""
    return -(-threads * sums // 16) * 16 + threads * per_thread


class _Settled(NamedTuple):
    """What depends on how many rows x has, and of which dtype.

    Attributes:
        batch: rows of x.
        kind: of its elements, of `scaled_layout`.
        like: a tensor like the output.
        shards: by shard where its outputs begin, in bytes, its words, its tile, and words of scratch: sums, and a
            thread's own.
    """

    batch: int
    kind: int
    like: Tensor
    shards: list[tuple[int, bytes, int, int, int]]


@functools.lru_cache(maxsize=256)
def _like(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One tensor for all calls with such an output: making another like it takes half as long as saying what it is."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device="cpu")


def weight_words(weight: ScaledWeight, first: int, width: int) -> bytes:
    """The words of `WEIGHT_FIELDS` for the outputs from `first` on, `width` of them."""
    groups, order = weight.scales.shape[0], weight.group_of_row
    several = groups > 1
    return _WEIGHT.pack(
        *(weight.codes.data_ptr() + first // weight.unit, weight.codes.stride(0)),
        *part_words(weight.scales, first),
        *part_words(weight.zeros, first),
        *part_words(weight.offsets, first),
        order.data_ptr() if several and order is not None else 0,
        weight.group_size if several else weight.in_features,
        *(groups, weight.in_features, width),
    )


def part_words(tensor: Tensor | None, first: int) -> tuple[int, int, int]:
    """Address, kind and stride of what belongs to the outputs from `first` on."""
    if tensor is None:
        return 0, layout.NOTHING, 0
    return tensor.data_ptr() + first * tensor.element_size(), KINDS[tensor.dtype], tensor.stride(0)
