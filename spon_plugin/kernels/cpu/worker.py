# SPDX-License-Identifier: Apache-2.0
"""What each thread of the CPU kernel does, compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from spon_plugin.kernels.cpu import layout
from spon_plugin.kernels.cpu.layout import BIAS_ELEMENT, BIAS_FLOAT32, BLOCK, FIELDS
from spon_plugin.kernels.cpu.numba_types import narrow, pointer, prefetch, widen

# The threads are those of the OpenMP runtime that torch has loaded: one pool, so that kernels and torch's own operators
# follow each other without two sets of threads fighting for the cores.
_thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
_thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())
_barrier = types.ExternalFunction("GOMP_barrier", types.void())

TILE = 2048  # outputs per pass of a batch: a tile of the rows in flight stays in the first cache
AHEAD = 64  # elements at the start of a row that are asked for early
IN_FLIGHT = 8  # weight rows read at once; fewer leave memory waiting, more gain nothing

# "contract" lets a product and a sum fuse. Nothing else of fastmath: NaN must stay NaN, and sums keep their order.
_OPTIONS: dict[str, Any] = {"fastmath": {"contract"}, "boundscheck": False}

_thread_parts = njit(layout.thread_parts)


@njit(**_OPTIONS)
def _mark_active(x: Any, threshold: Any, per_channel: int, active: Any) -> None:
    """``active[i]``: whether any row keeps input i; the rule of `masking.keep_mask`, with NaN kept."""
    for i in range(active.size):
        active[i] = 0
    for b in range(x.shape[0]):
        row = x[b]
        if per_channel:
            for i in range(active.size):
                active[i] |= np.int32(not (abs(widen(row[i])) <= threshold[i]))
        else:
            tau = threshold[0]
            for i in range(active.size):
                active[i] |= np.int32(not (abs(widen(row[i])) <= tau))


@njit(**_OPTIONS)
def _share(active: Any, counts: Any, thread: int, threads: int, index: Any) -> Any:
    """This thread's even share of the active inputs, in order, as a part of `index`, which it writes."""
    total = 0
    for k in range(counts.size):
        block = active[k * BLOCK : (k + 1) * BLOCK]
        count: Any = np.int32(0)
        for i in range(block.size):
            count += block[i]
        counts[k] = count
        total += count
    first, last = total * thread // threads, total * (thread + 1) // threads
    before, found, skip = 0, 0, 0
    for k in range(counts.size):
        if before < last and before + counts[k] > first:
            if found == 0:
                skip = first - before
            # Whole blocks, without branches: half of the inputs are active, and no predictor knows which.
            block = active[k * BLOCK : (k + 1) * BLOCK]
            for i in range(block.size):
                index[found] = k * BLOCK + i
                found += block[i]
        before += counts[k]
    return index[skip : skip + last - first]


@njit(**_OPTIONS)
def _gather_values(x: Any, threshold: Any, per_channel: int, index: Any, values: Any) -> None:
    """``values[b, q]``: input ``index[q]`` of row b, or 0 where that row masks it."""
    for b in range(x.shape[0]):
        for q in range(index.size):
            value = widen(x[b, index[q]])
            tau = threshold[index[q]] if per_channel else threshold[0]
            values[b, q] = np.float32(0) if abs(value) <= tau else value


@njit(**_OPTIONS)
def _add_to_one(out: Any, v: Any, w0: Any, w1: Any, w2: Any, w3: Any, w4: Any, w5: Any, w6: Any, w7: Any) -> None:
    v0, v1, v2, v3, v4, v5, v6, v7 = v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]
    for j in range(out.size):
        out[j] += (
            v0 * widen(w0[j]) + v1 * widen(w1[j]) + v2 * widen(w2[j]) + v3 * widen(w3[j])
            + v4 * widen(w4[j]) + v5 * widen(w5[j]) + v6 * widen(w6[j]) + v7 * widen(w7[j])
        )  # fmt: skip


@njit(**_OPTIONS)
def _add_to_four(
    outs: Any, values: Any, w0: Any, w1: Any, w2: Any, w3: Any, w4: Any, w5: Any, w6: Any, w7: Any
) -> None:
    """`_add_to_one` for four rows of the batch at once: each weight is widened once, and widening is the cost."""
    a, b, c, d = outs[0], outs[1], outs[2], outs[3]
    p, q, r, s = values[0], values[1], values[2], values[3]
    for j in range(a.size):
        x0, x1, x2, x3 = widen(w0[j]), widen(w1[j]), widen(w2[j]), widen(w3[j])
        x4, x5, x6, x7 = widen(w4[j]), widen(w5[j]), widen(w6[j]), widen(w7[j])
        a[j] += p[0] * x0 + p[1] * x1 + p[2] * x2 + p[3] * x3 + p[4] * x4 + p[5] * x5 + p[6] * x6 + p[7] * x7
        b[j] += q[0] * x0 + q[1] * x1 + q[2] * x2 + q[3] * x3 + q[4] * x4 + q[5] * x5 + q[6] * x6 + q[7] * x7
        c[j] += r[0] * x0 + r[1] * x1 + r[2] * x2 + r[3] * x3 + r[4] * x4 + r[5] * x5 + r[6] * x6 + r[7] * x7
        d[j] += s[0] * x0 + s[1] * x1 + s[2] * x2 + s[3] * x3 + s[4] * x4 + s[5] * x5 + s[6] * x6 + s[7] * x7


@njit(**_OPTIONS)
def _accumulate(weight: Any, index: Any, values: Any, sums: Any) -> None:
    """``sums[b] += sum over q of values[b, q] * weight[index[q]]``."""
    batch, out_features = sums.shape
    tile = out_features if batch == 1 else TILE
    grouped = index.size - index.size % IN_FLIGHT
    for q in range(0, grouped, IN_FLIGHT):
        # The starts of the rows to come: their pages are looked up while these rows are read.
        for n in range(q + IN_FLIGHT, min(q + 2 * IN_FLIGHT, index.size)):
            ahead = weight[index[n], :out_features]
            for j in range(0, min(AHEAD, out_features), 32):
                prefetch(ahead, j)
        for start in range(0, out_features, tile):
            stop = min(start + tile, out_features)
            w0, w1 = weight[index[q], start:stop], weight[index[q + 1], start:stop]
            w2, w3 = weight[index[q + 2], start:stop], weight[index[q + 3], start:stop]
            w4, w5 = weight[index[q + 4], start:stop], weight[index[q + 5], start:stop]
            w6, w7 = weight[index[q + 6], start:stop], weight[index[q + 7], start:stop]
            done = batch - batch % 4
            for b in range(0, done, 4):
                outs = (sums[b, start:stop], sums[b + 1, start:stop], sums[b + 2, start:stop], sums[b + 3, start:stop])
                four = (
                    values[b, q : q + IN_FLIGHT], values[b + 1, q : q + IN_FLIGHT],
                    values[b + 2, q : q + IN_FLIGHT], values[b + 3, q : q + IN_FLIGHT],
                )  # fmt: skip
                _add_to_four(outs, four, w0, w1, w2, w3, w4, w5, w6, w7)
            for b in range(done, batch):
                _add_to_one(sums[b, start:stop], values[b, q : q + IN_FLIGHT], w0, w1, w2, w3, w4, w5, w6, w7)
    for q in range(grouped, index.size):
        row = weight[index[q], :out_features]
        for b in range(batch):
            value, out = values[b, q], sums[b]
            for j in range(out.size):
                out[j] += value * widen(row[j])


@njit(**_OPTIONS)
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
    finishes a range of outputs. The same number of threads gives the same bits.
    """
    n_fields = len(FIELDS)

    def worker(words):  # type: ignore[no-untyped-def]
        fields = carray(words, n_fields)
        batch, in_features, out_features = fields[layout.BATCH], fields[layout.IN_FEATURES], fields[layout.OUT_FEATURES]
        row_stride, per_channel, kind = fields[layout.ROW_STRIDE], fields[layout.PER_CHANNEL], fields[layout.BIAS_KIND]
        x = carray(pointer(fields[layout.X], element), (batch, in_features))
        weight = carray(pointer(fields[layout.WEIGHT_T], element), (in_features, row_stride))
        threshold = carray(pointer(fields[layout.THRESHOLD], types.float32), (in_features if per_channel else 1,))
        y = carray(pointer(fields[layout.Y], element), (batch, row_stride))
        thread, threads = _thread_number(), _thread_count()

        scratch = fields[layout.SCRATCH]
        at_values, at_active, at_index, at_counts, size = _thread_parts(batch, in_features)
        own = scratch + 4 * (threads * batch * out_features + thread * size)
        partial = carray(pointer(scratch, types.float32), (threads, batch, out_features))
        values = carray(pointer(own + 4 * at_values, types.float32), (batch, in_features))
        active = carray(pointer(own + 4 * at_active, types.int32), (in_features,))
        index = carray(pointer(own + 4 * at_index, types.int32), (in_features,))
        counts = carray(pointer(own + 4 * at_counts, types.int32), (size - at_counts,))

        _mark_active(x, threshold, per_channel, active)
        index = _share(active, counts, thread, threads, index)
        _gather_values(x, threshold, per_channel, index, values)
        sums = partial[thread]
        for b in range(batch):
            row = sums[b]
            for j in range(row.size):
                row[j] = np.float32(0)
        _accumulate(weight, index, values, sums)
        _barrier()

        # Whole cache lines per thread, so that no two threads write the same one.
        lines = (out_features + 63) // 64
        start = min(lines * thread // threads * 64, out_features)
        stop = min(lines * (thread + 1) // threads * 64, out_features)
        bias_element = carray(pointer(fields[layout.BIAS], element), (out_features,))
        bias_float = carray(pointer(fields[layout.BIAS], types.float32), (out_features,))
        _finish(partial, start, stop, bias_element, bias_float, kind, y)

    signature = types.void(types.CPointer(types.int64))
    try:
        return cfunc(signature, cache=True, **_OPTIONS)(worker)
    except RuntimeError:  # no folder to cache in is writable: compile in every process
        return cfunc(signature, **_OPTIONS)(worker)
