# SPDX-License-Identifier: Apache-2.0
"""`sparse_linear` for decoding on a CPU: reads only the weight rows that the mask keeps."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spon_plugin.kernels.arguments import Thresholds

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 256  # inputs per count; a thread finds its share of the active list by blocks

# The arguments of the compiled function travel as one array of 64-bit words.
FIELDS = (
    "x", "weight_t", "threshold", "bias", "y", "scratch",
    "batch", "in_features", "out_features", "row_stride", "per_channel", "bias_kind",
)  # fmt: skip
NO_BIAS, BIAS_FLOAT32, BIAS_ELEMENT = 0, 1, 2
_Fields = ctypes.c_int64 * len(FIELDS)

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
def _parallel() -> Any:
    call = ctypes.CDLL(None).GOMP_parallel
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    call.restype = None
    return call


@functools.lru_cache(maxsize=len(DTYPES))
def _worker(dtype: torch.dtype) -> tuple[Any, int]:
    """The compiled thread function and its address; the first call compiles it, or loads it from Numba's cache."""
    from spon_plugin.kernels import cpu_worker, numba_types

    element = {
        torch.float32: numba_types.FLOAT32,
        torch.bfloat16: numba_types.BFLOAT16,
        torch.float16: numba_types.FLOAT16,
    }[dtype]
    compiled = cpu_worker.compile_worker(element)
    return compiled, compiled.address


def _scratch(threads: int, batch: int, in_features: int, out_features: int) -> Tensor:
    """What the threads work in, held between calls: fresh pages would cost more than the work on them.

    For each thread: sums ``[batch, out_features]``; values ``[batch, in_features]``; flags and indices of active
    inputs ``[in_features]``; their counts by block.
    """
    blocks = -(-in_features // BLOCK)
    floats = threads * (batch * (out_features + in_features) + 2 * in_features + blocks)
    held: Tensor | None = getattr(_local, "scratch", None)
    if held is None or held.numel() < floats:
        held = _local.scratch = torch.empty(floats, dtype=torch.float32, device="cpu")
    return held


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
    batch = x.numel() // in_features
    y = x.new_empty((*x.shape[:-1], out_features))
    threads = torch.get_num_threads()
    scratch = _scratch(threads, batch, in_features, out_features).data_ptr()
    weight_address, y_address, bias_address, size = weight_t.data_ptr(), y.data_ptr(), 0, x.element_size()
    kind, bias_size = NO_BIAS, 0
    if bias is not None:
        bias = bias.contiguous()
        bias_address, bias_size = bias.data_ptr(), bias.element_size()
        kind = BIAS_FLOAT32 if bias.dtype == torch.float32 else BIAS_ELEMENT
    _, address = _worker(x.dtype)
    for tau, width in zip(*Thresholds.of(threshold, weight_t, shard_sizes), strict=True):
        tau = tau.contiguous()
        fields = _Fields(
            x.data_ptr(),
            weight_address,
            tau.data_ptr(),
            bias_address,
            y_address,
            scratch,
            batch,
            in_features,
            width,
            out_features,
            tau.numel() > 1,
            kind,
        )
        _parallel()(address, ctypes.addressof(fields), threads, 0)
        weight_address, y_address, bias_address = (
            weight_address + width * size,
            y_address + width * size,
            bias_address + width * bias_size,
        )
    return y
