# SPDX-License-Identifier: Apache-2.0
"""`sparse_linear` for decoding on a CPU: reads only the weight rows that the mask keeps."""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spon_plugin.kernels.arguments import Thresholds
from spon_plugin.kernels.cpu.layout import (
    BIAS_ELEMENT,
    BIAS_FLOAT32,
    CALL_FIELDS,
    NO_BIAS,
    WEIGHT_FIELDS,
    scratch_size,
)
from spon_plugin.machine import DTYPES

_CALL, _WEIGHT = struct.Struct(f"{len(CALL_FIELDS)}q"), struct.Struct(f"{len(WEIGHT_FIELDS)}q")

_local = threading.local()


class Stage(NamedTuple):
    """A thread function with its arguments: what a `program.Program` is made of.

    Attributes:
        function: its address.
        words: its fields, 8 bytes each; the caller keeps alive what they point at.
    """

    function: int
    words: bytes


@functools.lru_cache(maxsize=1)
def is_available() -> bool:
    """Whether the kernel runs here: Numba is installed, and torch's OpenMP runtime has the calls of GNU's (Linux)."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    # Windows has no table of all symbols to ask.
    return sys.platform != "win32" and hasattr(ctypes.CDLL(None), "GOMP_parallel")


@functools.lru_cache(maxsize=1)
def parallel() -> Any:
    """`GOMP_parallel` of the OpenMP runtime that torch has loaded: function, its words, number of threads, 0."""
    call = ctypes.CDLL(None).GOMP_parallel
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    call.restype = None
    return call


def element(dtype: torch.dtype) -> Any:
    """What compiled functions see elements of `dtype` as; see `numba_types`."""
    from spon_plugin.kernels.cpu import numba_types

    return {
        torch.float32: numba_types.FLOAT32,
        torch.bfloat16: numba_types.BFLOAT16,
        torch.float16: numba_types.FLOAT16,
    }[dtype]


@functools.lru_cache(maxsize=len(DTYPES))
def _worker(dtype: torch.dtype) -> tuple[Any, int]:
    """The compiled thread function and its address; the first call compiles it, or loads it from Numba's cache."""
    from spon_plugin.kernels.cpu import worker as cpu_worker

    compiled = cpu_worker.compile_worker(element(dtype))
    return compiled, compiled.address


def scratch(words: int) -> Tensor:
    """At least `words` times 4 bytes that threads work in, as the last call of this Python thread left them.

    They are held between calls: fresh pages would cost more than the work on them.
    """
    held: Tensor | None = getattr(_local, "scratch", None)
    if held is None or held.numel() < words:
        held = _local.scratch = torch.empty(words, dtype=torch.float32, device="cpu")
    return held


def new_barrier() -> Tensor:
    """The memory of a `barrier`: a cache line, for threads that wait at it one team at a time."""
    return torch.zeros(16, dtype=torch.int32, device="cpu")


# Programs run one at a time.
_of_programs = new_barrier()


def barrier() -> int:
    """Address of the barrier that the threads wait at which this Python thread starts."""
    held: Tensor | None = getattr(_local, "barrier", None)
    if held is None:
        held = _local.barrier = new_barrier()
    return held.data_ptr()


def barrier_of_programs() -> int:
    """Address of the barrier that the threads of a program wait at, at the end of a stage and within it."""
    return _of_programs.data_ptr()


def launch(
    x: int,
    threshold: int,
    batch: int,
    in_features: int,
    per_channel: int,
    weights: Sequence[tuple[int, int, int, int, int, int]],
    worker: int,
) -> None:
    """Run the threads on one x and as many weights as there are.

    Args:
        x: an address, as `threshold` and `worker` are.
        threshold: see there.
        batch: rows of x.
        in_features: length of one.
        per_channel: 1 where the threshold is.
        weights: for each the fields of `layout.WEIGHT_FIELDS`, the first three of which are addresses.
        worker: see `x`.
    """
    threads, out_features = torch.get_num_threads(), sum(weight[3] for weight in weights)
    held = scratch(scratch_size(threads, batch, in_features, out_features))
    words = _CALL.pack(x, threshold, held.data_ptr(), batch, in_features, per_channel, len(weights), barrier())
    parallel()(worker, words + b"".join(_WEIGHT.pack(*weight) for weight in weights), threads, 0)


def sparse_linear(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
) -> Tensor:
    """`reference.sparse_linear` on a CPU, for few rows; every row that the mask of some row keeps is read once.

    Sums are float32, in an order that depends on the number of threads alone: the same call gives the same bits.
    """
    threshold, bias = threshold.contiguous(), None if bias is None else bias.contiguous()
    return Shards(weight_t, threshold, bias, shard_sizes)(x)


class Shards:
    """`sparse_linear` with all of its arguments but x, contiguous: addresses are kept, the caller keeps the tensors."""

    __slots__ = ("_shards", "_worker", "in_features", "out_features")

    def __init__(
        self, weight_t: Tensor, threshold: Tensor, bias: Tensor | None, shard_sizes: Sequence[int] | None
    ) -> None:
        self.in_features, self.out_features = weight_t.shape
        self._worker, size = _worker(weight_t.dtype)[1], weight_t.element_size()
        thresholds = Thresholds.of(threshold, weight_t, shard_sizes)
        # Of a shard its threshold, and whether that is per channel; weight and bias; where its outputs begin, in bytes,
        # and their number; and of which kind the bias is.
        self._shards: list[tuple[int, int, int, int, int, int, int]] = []
        first = 0
        for tau, width in zip(thresholds.rows, thresholds.sizes, strict=True):
            at_bias = 0 if bias is None else bias.data_ptr() + first * bias.element_size()
            mask, offset = (tau.data_ptr(), int(tau.numel() > 1)), first * size
            self._shards.append((*mask, weight_t.data_ptr() + offset, at_bias, offset, width, _bias_kind(bias)))
            first += width

    def __call__(self, x: Tensor) -> Tensor:
        """The output for a CPU tensor x ``[..., in_features]`` of the weight's dtype."""
        x, in_features, out_features = x.contiguous(), self.in_features, self.out_features
        y = x.new_empty((*x.shape[:-1], out_features))
        source, target, batch = x.data_ptr(), y.data_ptr(), x.numel() // in_features
        for threshold, per_channel, weight, bias, offset, width, kind in self._shards:
            words = (weight, bias, target + offset, width, out_features, kind)
            launch(source, threshold, batch, in_features, per_channel, [words], self._worker)
        return y


def _bias_kind(bias: Tensor | None) -> int:
    if bias is None:
        return NO_BIAS
    return BIAS_FLOAT32 if bias.dtype == torch.float32 else BIAS_ELEMENT


class Prepared:
    """`sparse_linear` on one or more weights that read the same x, with all arguments but that.

    Their addresses are kept: the caller keeps the tensors alive.

    Attributes:
        dtype: of the weights, which x must have.
        in_features: length of an input.
        out_features: lengths of the outputs.
    """

    __slots__ = ("_ends", "_mask", "_starts", "_worker", "dtype", "in_features", "out_features")

    def __init__(self, weights: Sequence[Tensor], threshold: Tensor, biases: Sequence[Tensor | None]) -> None:
        self.dtype, self.in_features = weights[0].dtype, weights[0].shape[0]
        self.out_features = [weight.shape[1] for weight in weights]
        self._mask, self._worker = (threshold.data_ptr(), int(threshold.numel() > 1)), _worker(self.dtype)[1]
        pairs = list(zip(weights, biases, strict=True))
        self._starts = [(w.data_ptr(), 0 if bias is None else bias.data_ptr()) for w, bias in pairs]
        self._ends = [(w.shape[1], w.shape[1], _bias_kind(bias)) for w, bias in pairs]

    def __call__(self, x: Tensor, batch: int) -> list[Tensor]:
        """The outputs for a CPU tensor x ``[..., in_features]`` with `batch` rows in all."""
        x, before = x.contiguous(), x.shape[:-1]
        outputs = [x.new_empty((*before, size)) for size in self.out_features]
        weights = [
            (*start, y.data_ptr(), *end) for start, y, end in zip(self._starts, outputs, self._ends, strict=True)
        ]
        (threshold, per_channel), in_features = self._mask, self.in_features
        launch(x.data_ptr(), threshold, batch, in_features, per_channel, weights, self._worker)
        return outputs

    def scratch_words(self, threads: int) -> int:
        """Words of 4 bytes of the scratch of a `stage`."""
        return scratch_size(threads, 1, self.in_features, sum(self.out_features))

    def stage(self, x: Tensor, outputs: Sequence[Tensor], scratch: Tensor) -> Stage:
        """The call for one row x ``[in_features]``, the results of which are `outputs`; all contiguous."""
        (threshold, per_channel), place = self._mask, scratch.data_ptr()
        sizes = (1, self.in_features, per_channel, len(outputs))
        head = _CALL.pack(x.data_ptr(), threshold, place, *sizes, barrier_of_programs())
        each = zip(self._starts, outputs, self._ends, strict=True)
        return Stage(self._worker, head + b"".join(_WEIGHT.pack(*start, y.data_ptr(), *end) for start, y, end in each))


def prepare(weights: Sequence[Tensor], threshold: Tensor, biases: Sequence[Tensor | None]) -> Prepared | None:
    """Settle all arguments but x; None for those that the kernel does not take as they are.

    Args:
        weights: ``[in_features, out_features]`` each.
        threshold: see `kernels.sparse_linear`.
        biases: one for each weight.
    """
    first = weights[0]
    plain = threshold.is_cpu and threshold.dtype == torch.float32 and threshold.is_contiguous()
    if first.dim() != 2 or not plain or tuple(threshold.shape) not in ((1,), (first.shape[0],)):
        return None
    for weight_t, bias in zip(weights, biases, strict=True):
        if weight_t.dim() != 2 or weight_t.dtype not in DTYPES.values() or not weight_t.numel():
            return None
        if not (weight_t.is_cpu and weight_t.is_contiguous()):
            return None
        if (weight_t.dtype, weight_t.shape[0]) != (first.dtype, first.shape[0]):
            return None
        if bias is not None:
            plain = bias.is_cpu and bias.dtype in (torch.float32, weight_t.dtype) and bias.is_contiguous()
            if not plain or tuple(bias.shape) != (weight_t.shape[1],):
                return None
    return Prepared(weights, threshold, biases) if is_available() else None
