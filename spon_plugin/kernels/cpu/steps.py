# SPDX-License-Identifier: Apache-2.0
"""The steps that the threads of every CPU kernel share, compiled by Numba: who reads which rows of the weight."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc, njit, types

from spon_plugin.kernels.cpu.layout import BLOCK
from spon_plugin.kernels.cpu.numba_types import widen

# The threads are those of the OpenMP runtime that torch has loaded: one pool, so that kernels and torch's own operators
# follow each other without two sets of threads fighting for the cores.
thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())

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
