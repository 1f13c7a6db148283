# SPDX-License-Identifier: Apache-2.0
"""What each thread of the CPU kernel does, compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from spon_plugin.kernels.cpu import layout
from spon_plugin.kernels.cpu.barrier import wait_for_all
from spon_plugin.kernels.cpu.layout import BIAS_ELEMENT, BIAS_FLOAT32, CALL_FIELDS, WEIGHT_FIELDS
from spon_plugin.kernels.cpu.numba_types import narrow, pointer, widen
from spon_plugin.kernels.cpu.rows_dot import IN_FLIGHT, rows_dot
from spon_plugin.kernels.cpu.sources import fingerprint
from spon_plugin.kernels.cpu.steps import (
    OPTIONS,
    gather_values,
    mark_active,
    own_outputs,
    share,
    thread_count,
    thread_function,
    thread_number,
)

TILE = 2048  # outputs per pass of a batch: a tile of the rows in flight stays in the first cache

_thread_parts = njit(layout.thread_parts)


@njit(**OPTIONS)
def _accumulate(weight: Any, index: Any, values: Any, sums: Any) -> None:
    """``sums[b] += sum over q of values[b, q] * weight[index[q]]``."""
    batch, out_features = sums.shape
    if batch == 1 or out_features <= TILE:
        rows_dot(weight, index, values, 0, index.size, index.size, 0, out_features, sums, 0)
        return
    for q in range(0, index.size, IN_FLIGHT):
        for start in range(0, out_features, TILE):
            end, stop = min(q + IN_FLIGHT, index.size), min(start + TILE, out_features)
            rows_dot(weight, index, values, q, end, index.size, start, stop, sums, start)


@njit(**OPTIONS)
def _finish(partial: Any, start: int, stop: int, bias_element: Any, bias_float: Any, kind: int, y: Any) -> None:
    """Add up the threads' partial sums of outputs ``start:stop`` in the order of the threads, add the bias, round."""
    for b in range(y.shape[0]):
        out, total = y[b, start:stop], partial[0, b, start:stop]
        for t in range(1, partial.shape[0]):
            other = partial[t, b, start:stop]
            for j in range(total.size):
                total[j] += other[j]
        if kind == BIAS_FLOAT32:
            wide = bias_float[start:stop]
            for j in range(total.size):
                total[j] += wide[j]
        elif kind == BIAS_ELEMENT:
            same = bias_element[start:stop]
            for j in range(total.size):
                total[j] += widen(same[j])
        for j in range(out.size):
            out[j] = narrow(total[j], out[j])


def compile_worker(element: Any) -> Any:
    """The thread function ``void (int64_t *fields)`` for elements of a type of `numba_types`, as a Numba `cfunc`.

    Threads share the list of active inputs evenly and read whole rows: long contiguous reads are what memory is fast
    at, and narrow layers need no other split. Each thread sums into its own row of the scratch; after a barrier each
    finishes a range of outputs. The same number of threads gives the same bits. Several weights that read the same x
    share its mask and the list of active inputs; an output has the bits that it has in a call of its own.
    """
    n_call, n_weight, source = len(CALL_FIELDS), len(WEIGHT_FIELDS), fingerprint()

    def worker(words):  # type: ignore[no-untyped-def]
        source  # noqa: B018 (part of the key in Numba's cache)
        call = carray(words, n_call)
        batch, in_features, count = call[layout.BATCH], call[layout.IN_FEATURES], call[layout.WEIGHTS]
        weights = carray(words, n_call + count * n_weight)[n_call:].reshape((count, n_weight))
        per_channel, scratch = call[layout.PER_CHANNEL], call[layout.SCRATCH]
        x = carray(pointer(call[layout.X], element), (batch, in_features))
        threshold = carray(pointer(call[layout.THRESHOLD], types.float32), (in_features if per_channel else 1,))
        thread, threads = thread_number(), thread_count()
        total = 0
        for k in range(count):
            total += weights[k, layout.OUT_FEATURES]

        at_values, at_active, at_index, at_counts, size = _thread_parts(batch, in_features)
        own = scratch + 4 * (threads * batch * total + thread * size)
        values = carray(pointer(own + 4 * at_values, types.float32), (batch, in_features))
        active = carray(pointer(own + 4 * at_active, types.int32), (in_features,))
        index = carray(pointer(own + 4 * at_index, types.int32), (in_features,))
        counts = carray(pointer(own + 4 * at_counts, types.int32), (size - at_counts,))

        mark_active(x, threshold, per_channel, active)
        index = share(active, counts, thread, threads, index)
        gather_values(x, threshold, per_channel, index, values)
        at = scratch
        for k in range(count):
            out_features, stride = weights[k, layout.OUT_FEATURES], weights[k, layout.ROW_STRIDE]
            sums = carray(pointer(at, types.float32), (threads, batch, out_features))[thread]
            for b in range(batch):
                row = sums[b]
                for j in range(row.size):
                    row[j] = np.float32(0)
            weight = carray(pointer(weights[k, layout.WEIGHT_T], element), (in_features, stride))
            _accumulate(weight, index, values, sums)
            at += 4 * threads * batch * out_features
        wait_for_all(call[layout.BARRIER], threads)

        at = scratch
        for k in range(count):
            out_features, stride = weights[k, layout.OUT_FEATURES], weights[k, layout.ROW_STRIDE]
            partial = carray(pointer(at, types.float32), (threads, batch, out_features))
            start, stop = own_outputs(out_features, thread, threads)
            bias_element = carray(pointer(weights[k, layout.BIAS], element), (out_features,))
            bias_float = carray(pointer(weights[k, layout.BIAS], types.float32), (out_features,))
            y = carray(pointer(weights[k, layout.Y], element), (batch, stride))
            _finish(partial, start, stop, bias_element, bias_float, weights[k, layout.BIAS_KIND], y)
            at += 4 * threads * batch * out_features

    return thread_function(worker)
