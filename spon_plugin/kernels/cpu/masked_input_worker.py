# SPDX-License-Identifier: Apache-2.0
"""What each thread does to mask the inputs of many tokens, and their gradients, compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from spon_plugin.kernels.cpu.numba_types import narrow, pointer, widen
from spon_plugin.kernels.cpu.sources import fingerprint
from spon_plugin.kernels.cpu.steps import OPTIONS, thread_count, thread_function, thread_number

FORWARD_FIELDS = ("x", "threshold", "center", "shift", "dense", "out", "keep", "rows", "in_features", "per_channel")
BACKWARD_FIELDS = ("grad", "keep", "dense", "out", "sums", "rows", "in_features")


@njit(**OPTIONS)
def _mask_row(x: Any, threshold: Any, per_channel: int, out: Any, keep: Any) -> None:
    """``x`` where kept, by the rule of `masking.keep_mask`, and 0 elsewhere."""
    if per_channel:
        for i in range(x.size):
            value = widen(x[i])
            kept = not (abs(value) <= threshold[i])
            keep[i] = np.int8(kept)
            out[i] = x[i] if kept else narrow(np.float32(0), x[i])
    else:
        tau = threshold[0]
        for i in range(x.size):
            value = widen(x[i])
            kept = not (abs(value) <= tau)
            keep[i] = np.int8(kept)
            out[i] = x[i] if kept else narrow(np.float32(0), x[i])


@njit(**OPTIONS)
def _mask_deviation(x: Any, center: Any, threshold: Any, per_channel: int, out: Any, keep: Any) -> None:
    """`_mask_row` of ``x - center``, rounded. In one loop: a row masked in its own place would not be vectorized."""
    if per_channel:
        for i in range(x.size):
            apart = narrow(widen(x[i]) - center[i], x[i])
            kept = not (abs(widen(apart)) <= threshold[i])
            keep[i] = np.int8(kept)
            out[i] = apart if kept else narrow(np.float32(0), x[i])
    else:
        tau = threshold[0]
        for i in range(x.size):
            apart = narrow(widen(x[i]) - center[i], x[i])
            kept = not (abs(widen(apart)) <= tau)
            keep[i] = np.int8(kept)
            out[i] = apart if kept else narrow(np.float32(0), x[i])


@njit(**OPTIONS)
def _add(shift: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = narrow(widen(out[i]) + shift[i], out[i])


@njit(**OPTIONS)
def _copy(x: Any, out: Any, keep: Any) -> None:
    for i in range(x.size):
        out[i] = x[i]
        keep[i] = np.int8(1)


@njit(**OPTIONS)
def _pass_row(grad: Any, keep: Any, out: Any) -> None:
    """The gradient of what was kept."""
    for i in range(grad.size):
        out[i] = grad[i] if keep[i] != 0 else narrow(np.float32(0), grad[i])


@njit(**OPTIONS)
def _sum_row(grad: Any, sums: Any) -> None:
    for i in range(grad.size):
        sums[i] += widen(grad[i])


def compile_forward(element: Any) -> Any:
    """``out = S(x) - center + shift`` and the mask, as a Numba `cfunc` ``void (int64_t *fields)``.

    The fields are `FORWARD_FIELDS`; a centre, a shift or dense tokens that there are none of have address 0. Threads
    share the rows evenly.

    Args:
        element: of `numba_types`, of `x` and `out`.
    """
    n_fields, source = len(FORWARD_FIELDS), fingerprint()

    def worker(words):  # type: ignore[no-untyped-def]
        source  # noqa: B018 (part of the key in Numba's cache)
        at_x, at_threshold, at_center, at_shift, at_dense, at_out, at_keep, rows, width, per_channel = carray(
            words, (n_fields,)
        )
        x = carray(pointer(at_x, element), (rows, width))
        out = carray(pointer(at_out, element), (rows, width))
        keep = carray(pointer(at_keep, types.int8), (rows, width))
        threshold = carray(pointer(at_threshold, types.float32), (width if per_channel else 1,))
        center = carray(pointer(at_center, types.float32), (width,))
        shift = carray(pointer(at_shift, types.float32), (width,))
        dense = carray(pointer(at_dense, types.int8), (rows,))
        thread, threads = thread_number(), thread_count()
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            if at_dense != 0 and dense[row] != 0:
                _copy(x[row], out[row], keep[row])
                continue
            if at_center != 0:
                _mask_deviation(x[row], center, threshold, per_channel, out[row], keep[row])
            else:
                _mask_row(x[row], threshold, per_channel, out[row], keep[row])
            if at_shift != 0:
                _add(shift, out[row])

    return thread_function(worker)


def compile_backward(element: Any) -> Any:
    """``out``, the gradient of the input, and each thread's share of the shift's, as a Numba `cfunc`.

    The fields are `BACKWARD_FIELDS`; ``sums`` are float32 ``[threads, in_features]``, or at address 0. Threads share
    the rows as in `compile_forward`.

    Args:
        element: of `numba_types`, of `grad` and `out`.
    """
    n_fields, source = len(BACKWARD_FIELDS), fingerprint()

    def worker(words):  # type: ignore[no-untyped-def]
        source  # noqa: B018 (part of the key in Numba's cache)
        at_grad, at_keep, at_dense, at_out, at_sums, rows, width = carray(words, (n_fields,))
        grad = carray(pointer(at_grad, element), (rows, width))
        out = carray(pointer(at_out, element), (rows, width))
        keep = carray(pointer(at_keep, types.int8), (rows, width))
        dense = carray(pointer(at_dense, types.int8), (rows,))
        thread, threads = thread_number(), thread_count()
        sums = carray(pointer(at_sums, types.float32), (threads, width))[thread]
        if at_sums != 0:
            for i in range(width):
                sums[i] = np.float32(0)
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            _pass_row(grad[row], keep[row], out[row])
            if at_sums != 0 and not (at_dense != 0 and dense[row] != 0):
                _sum_row(grad[row], sums)

    return thread_function(worker)
