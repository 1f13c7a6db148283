# SPDX-License-Identifier: Apache-2.0
"""`sparse_linear` for decoding on a CPU: reads only the weight rows that the mask keeps."""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spon_plugin.kernels.arguments import Thresholds
from spon_plugin.kernels.cpu.layout import BIAS_ELEMENT, BIAS_FLOAT32, FIELDS, NO_BIAS, scratch_size
from spon_plugin.machine import DTYPES

_WORDS = struct.Struct(f"{len(FIELDS)}q")

_local = threading.local()


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


def launch(
    x: int,
    weight_t: int,
    threshold: int,
    bias: int,
    y: int,
    batch: int,
    in_features: int,
    out_features: int,
    row_stride: int,
    per_channel: int,
    bias_kind: int,
    worker: int,
) -> None:
    """Run the threads; the first five arguments and `worker` are addresses."""
    threads = torch.get_num_threads()
    held = scratch(scratch_size(threads, batch, in_features, out_features))
    words = _WORDS.pack(
        x,
        weight_t,
        threshold,
        bias,
        y,
        held.data_ptr(),
        batch,
        in_features,
        out_features,
        row_stride,
        per_channel,
        bias_kind,
    )
    parallel()(worker, words, threads, 0)


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
    in_features, out_features = weight_t.shape
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    size, first = x.element_size(), 0
    bias = None if bias is None else bias.contiguous()
    for tau, width in zip(*Thresholds.of(threshold, weight_t, shard_sizes), strict=True):
        tau = tau.contiguous()
        launch(
            x.data_ptr(),
            weight_t.data_ptr() + first * size,
            tau.data_ptr(),
            0 if bias is None else bias.data_ptr() + first * bias.element_size(),
            y.data_ptr() + first * size,
            x.numel() // in_features,
            in_features,
            width,
            out_features,
            int(tau.numel() > 1),
            _bias_kind(bias),
            _worker(x.dtype)[1],
        )
        first += width
    return y


def _bias_kind(bias: Tensor | None) -> int:
    if bias is None:
        return NO_BIAS
    return BIAS_FLOAT32 if bias.dtype == torch.float32 else BIAS_ELEMENT


class Prepared:
    """`sparse_linear` with all of its arguments but x, whose addresses are kept: the caller keeps the tensors alive.

    Attributes:
        dtype: of the weight, which x must have.
        in_features: length of an input.
        out_features: length of an output.
    """

    __slots__ = ("_addresses", "_shape", "dtype", "in_features", "out_features")

    def __init__(self, weight_t: Tensor, threshold: Tensor, bias: Tensor | None) -> None:
        self.dtype = weight_t.dtype
        self.in_features, self.out_features = weight_t.shape
        self._addresses = (weight_t.data_ptr(), threshold.data_ptr(), 0 if bias is None else bias.data_ptr())
        per_channel, worker = int(threshold.numel() > 1), _worker(self.dtype)[1]
        self._shape = (self.in_features, self.out_features, self.out_features, per_channel, _bias_kind(bias), worker)

    def __call__(self, x: Tensor, batch: int) -> Tensor:
        """The output for a CPU tensor x ``[..., in_features]`` with `batch` rows in all."""
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.out_features))
        launch(x.data_ptr(), *self._addresses, y.data_ptr(), batch, *self._shape)
        return y


def prepare(weight_t: Tensor, threshold: Tensor, bias: Tensor | None) -> Prepared | None:
    """Settle all arguments but x; None for those that the kernel does not take as they are."""
    if weight_t.dim() != 2 or weight_t.dtype not in DTYPES.values() or not weight_t.numel():
        return None
    if not (weight_t.is_cpu and weight_t.is_contiguous()):
        return None
    in_features, out_features = weight_t.shape
    plain = threshold.is_cpu and threshold.dtype == torch.float32 and threshold.is_contiguous()
    if not plain or tuple(threshold.shape) not in ((1,), (in_features,)):
        return None
    if bias is not None:
        plain = bias.is_cpu and bias.dtype in (torch.float32, weight_t.dtype) and bias.is_contiguous()
        if not plain or tuple(bias.shape) != (out_features,):
            return None
    return Prepared(weight_t, threshold, bias) if is_available() else None
