# SPDX-License-Identifier: Apache-2.0
"""The steps that the threads of every CPU kernel share, compiled by Numba: who reads which rows, and float32 sums."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc, njit, types

from spon_plugin.kernels.cpu.layout import BLOCK
from spon_plugin.kernels.cpu.numba_types import widen
from spon_plugin.kernels.cpu.rows_dot import ROWS, rows_dot

# The threads are those of the OpenMP runtime that torch has loaded: one pool, so that kernels and torch's own operators
# follow each other without two sets of threads fighting for the cores.
thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())
barrier = types.ExternalFunction("GOMP_barrier", types.void())

IN_FLIGHT = ROWS  # weight rows read at once; fewer leave memory waiting, more gain nothing

# "contract" lets a product and a sum fuse. Nothing else of fastmath: NaN must stay NaN, and sums keep their order.
OPTIONS: dict[str, Any] = {"fastmath": {"contract"}, "boundscheck": False}


@njit(**OPTIONS)
def mark_active(x: Any, threshold: Any, per_channel: int, active: Any) -> None:
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


@njit(**OPTIONS)
def share(active: Any, counts: Any, thread: int, threads: int, index: Any) -> Any:
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


@njit(**OPTIONS)
def gather_values(x: Any, threshold: Any, per_channel: int, index: Any, values: Any) -> None:
    """``values[b, q]``: input ``index[q]`` of row b, or 0 where that row masks it."""
    for b in range(x.shape[0]):
        for q in range(index.size):
            value = widen(x[b, index[q]])
            tau = threshold[index[q]] if per_channel else threshold[0]
            values[b, q] = np.float32(0) if abs(value) <= tau else value


@njit(**OPTIONS)
def add_to_one(out: Any, v: Any, w0: Any, w1: Any, w2: Any, w3: Any, w4: Any, w5: Any, w6: Any, w7: Any) -> None:
    """``out += sum over k of v[k] * wk``, elements of any format, in the order of `rows_dot`, as `add_to_four`.

    A row of a batch thus has the bits that it has by itself.
    """
    v0, v1, v2, v3, v4, v5, v6, v7 = v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]
    for j in range(out.size):
        out[j] = (
            out[j] + v0 * widen(w0[j]) + v1 * widen(w1[j]) + v2 * widen(w2[j]) + v3 * widen(w3[j])
            + v4 * widen(w4[j]) + v5 * widen(w5[j]) + v6 * widen(w6[j]) + v7 * widen(w7[j])
        )  # fmt: skip


@njit(**OPTIONS)
def add_to_four(outs: Any, values: Any, w0: Any, w1: Any, w2: Any, w3: Any, w4: Any, w5: Any, w6: Any, w7: Any) -> None:
    """`add_to_one` for four rows of the batch at once: each weight is widened once, and widening is the cost."""
    a, b, c, d = outs[0], outs[1], outs[2], outs[3]
    p, q, r, s = values[0], values[1], values[2], values[3]
    for j in range(a.size):
        x0, x1, x2, x3 = widen(w0[j]), widen(w1[j]), widen(w2[j]), widen(w3[j])
        x4, x5, x6, x7 = widen(w4[j]), widen(w5[j]), widen(w6[j]), widen(w7[j])
        a[j] = (
            a[j] + p[0] * x0 + p[1] * x1 + p[2] * x2 + p[3] * x3
            + p[4] * x4 + p[5] * x5 + p[6] * x6 + p[7] * x7
        )  # fmt: skip
        b[j] = (
            b[j] + q[0] * x0 + q[1] * x1 + q[2] * x2 + q[3] * x3
            + q[4] * x4 + q[5] * x5 + q[6] * x6 + q[7] * x7
        )  # fmt: skip
        c[j] = (
            c[j] + r[0] * x0 + r[1] * x1 + r[2] * x2 + r[3] * x3
            + r[4] * x4 + r[5] * x5 + r[6] * x6 + r[7] * x7
        )  # fmt: skip
        d[j] = (
            d[j] + s[0] * x0 + s[1] * x1 + s[2] * x2 + s[3] * x3
            + s[4] * x4 + s[5] * x5 + s[6] * x6 + s[7] * x7
        )  # fmt: skip


@njit(**OPTIONS)
def _eight(weight: Any, index: Any, q: int, start: int, stop: int) -> Any:
    """Columns of the rows from ``index[q]`` on."""
    return (
        weight[index[q], start:stop], weight[index[q + 1], start:stop],
        weight[index[q + 2], start:stop], weight[index[q + 3], start:stop],
        weight[index[q + 4], start:stop], weight[index[q + 5], start:stop],
        weight[index[q + 6], start:stop], weight[index[q + 7], start:stop],
    )  # fmt: skip


@njit(**OPTIONS)
def add_rows(
    weight: Any, index: Any, values: Any, q: int, last: int, start: int, stop: int, sums: Any, at: int
) -> None:
    """Add `IN_FLIGHT` rows of the weight, times their inputs, to sums.

    Rows of arrays are sliced here, from whole arrays: Numba takes a slice of a slice for one with gaps, and then uses
    no vectors.

    Args:
        weight: ``[in_features, columns]``.
        index: int32, the active inputs.
        values: float32 ``[batch, active inputs]``.
        q: place of the first input.
        last: where the inputs end, up to which rows to come are asked for.
        start: first column.
        stop: where the columns end.
        sums: float32 ``[batch, columns]``; the first column's is number `at`.
        at: see there.
    """
    batch, end = values.shape[0], at + stop - start
    done = batch - batch % 4
    if done:
        rows = _eight(weight, index, q, start, stop)
        for b in range(0, done, 4):
            outs = (sums[b, at:end], sums[b + 1, at:end], sums[b + 2, at:end], sums[b + 3, at:end])
            four = (
                values[b, q : q + IN_FLIGHT], values[b + 1, q : q + IN_FLIGHT],
                values[b + 2, q : q + IN_FLIGHT], values[b + 3, q : q + IN_FLIGHT],
            )  # fmt: skip
            add_to_four(outs, four, *rows)
    for b in range(done, batch):
        columns = rows_dot(weight, index, values, q, last, start, stop, sums, b, at)
        if start + columns < stop:
            rest = _eight(weight, index, q, start + columns, stop)
            add_to_one(sums[b, at + columns : end], values[b, q : q + IN_FLIGHT], *rest)


@njit(**OPTIONS)
def add_row(row: Any, values: Any, q: int, sums: Any) -> None:
    """``sums[b] += values[b, q] * row``."""
    for b in range(values.shape[0]):
        value, out = values[b, q], sums[b]
        for j in range(row.size):
            out[j] += value * widen(row[j])


@njit(**OPTIONS)
def clear(sums: Any, width: int) -> None:
    """Zeros for the first `width` columns."""
    for b in range(sums.shape[0]):
        row = sums[b, :width]
        for j in range(row.size):
            row[j] = 0


@njit(**OPTIONS)
def own_outputs(out_features: int, thread: int, threads: int) -> Any:
    """The outputs that a thread finishes: whole cache lines, so that no two threads write the same one."""
    lines = (out_features + 63) // 64
    start = min(lines * thread // threads * 64, out_features)
    return start, min(lines * (thread + 1) // threads * 64, out_features)


def thread_function(worker: Any) -> Any:
    """`worker` as ``void (int64_t *fields)``, compiled, or loaded from Numba's cache."""
    signature = types.void(types.CPointer(types.int64))
    try:
        return cfunc(signature, cache=True, **OPTIONS)(worker)
    except RuntimeError:  # no folder to cache in is writable: compile in every process
        return cfunc(signature, **OPTIONS)(worker)
