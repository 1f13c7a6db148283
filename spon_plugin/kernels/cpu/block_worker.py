# SPDX-License-Identifier: Apache-2.0
"""The compiled functions of `block.py`: what one token of a decoder block needs between the linears."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from spon_plugin.kernels.cpu import block_layout as layout
from spon_plugin.kernels.cpu.barrier import wait_for_all
from spon_plugin.kernels.cpu.block_layout import (
    ADD_FIELDS,
    ATTEND_FIELDS,
    DEVIATE_FIELDS,
    GATE_FIELDS,
    GATE_TILE,
    GATE_WORDS,
    NORM_FIELDS,
)
from spon_plugin.kernels.cpu.numba_types import narrow, pointer, widen
from spon_plugin.kernels.cpu.sources import fingerprint
from spon_plugin.kernels.cpu.steps import (
    OPTIONS,
    own_outputs,
    thread_count,
    thread_function,
    thread_number,
)

_attend_parts = njit(layout.attend_parts)
# Sums over a head or a row, in whatever order vectors bring along: it depends on their length alone.
_SUMS: dict[str, Any] = {**OPTIONS, "fastmath": {"contract", "reassoc"}}
_LOG2E = np.float32(1.4426950408889634)
# Of 2 ** f for |f| <= 1/2: ln(2) ** k / k!.
_C1, _C2, _C3 = np.float32(0.6931471805599453), np.float32(0.24022650695910072), np.float32(0.05550410866482158)
_C4, _C5, _C6 = np.float32(0.009618129107628477), np.float32(0.0013333558146428443), np.float32(0.00015403530393381608)


@njit(**_SUMS)
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for j in range(a.size):
        total += a[j] * widen(b[j])
    return total


@njit(**_SUMS)
def _mean_of_squares(row: Any) -> Any:
    total = np.float32(0)
    for j in range(row.size):
        value = widen(row[j])
        total += value * value
    return total / np.float32(row.size)


@njit(**_SUMS)
def _sum(row: Any) -> Any:
    total = np.float32(0)
    for j in range(row.size):
        total += row[j]
    return total


@njit(**OPTIONS)
def _exponentials(numbers: Any, powers: Any, less: Any) -> None:
    """``exp(numbers - less)`` in place, to 1e-6 of itself and within what float32 holds; NaN stays.

    Two loops, as the compiler makes vectors of each.
    """
    for t in range(numbers.size):
        z = (numbers[t] - less) * _LOG2E
        z = np.float32(-126) if z < np.float32(-126) else z
        z = np.float32(127) if z > np.float32(127) else z
        whole = np.floor(z + np.float32(0.5))
        powers[t] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        f = z - whole
        numbers[t] = np.float32(1) + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    factors = powers.view(np.float32)
    for t in range(numbers.size):
        numbers[t] *= factors[t]


@njit(**OPTIONS)
def _largest(row: Any) -> Any:
    most = row[0]
    for t in range(row.size):
        most = row[t] if row[t] > most else most
    return most


@njit(**OPTIONS)
def _turn(x: Any, cos: Any, sin: Any, out: Any) -> None:
    """Rotary positions, rounded where transformers rounds; `out` of elements like x."""
    half = x.size // 2
    for j in range(half):
        first, second = widen(x[j]), widen(x[j + half])
        one = widen(narrow(first * widen(cos[j]), x[0]))
        other = widen(narrow(second * widen(sin[j]), x[0]))
        out[j] = narrow(one - other, x[0])
        one = widen(narrow(second * widen(cos[j + half]), x[0]))
        other = widen(narrow(first * widen(sin[j + half]), x[0]))
        out[j + half] = narrow(one + other, x[0])


def compile_norm(element: Any) -> Any:
    """`block_reference.add_norm` by the first thread, ``void (int64_t *fields)``; see `worker.compile_worker`."""
    n_fields, source = len(NORM_FIELDS), fingerprint()

    def worker(words):  # type: ignore[no-untyped-def]
        source  # noqa: B018 (part of the key in Numba's cache)
        fields = carray(words, n_fields)
        rows, size = fields[layout.ROWS], fields[layout.SIZE]
        eps = np.float32(fields.view(np.float64)[layout.EPS])
        x = carray(pointer(fields[layout.X], element), (rows, size))
        delta = carray(pointer(fields[layout.DELTA], element), (rows, size))
        weight = carray(pointer(fields[layout.WEIGHT], element), (size,))
        total = carray(pointer(fields[layout.TOTAL], element), (rows, size))
        out = carray(pointer(fields[layout.OUT], element), (rows, size))
        for r in range(rows if thread_number() == 0 else 0):
            row, target = x[r], out[r]
            if fields[layout.DELTA]:
                row = total[r]
                for j in range(size):
                    row[j] = narrow(widen(x[r, j]) + widen(delta[r, j]), x[r, j])
            factor = np.float32(1) / np.sqrt(_mean_of_squares(row) + eps)
            for j in range(size):
                scaled = widen(narrow(widen(row[j]) * factor, row[j]))
                target[j] = narrow(widen(weight[j]) * scaled, row[j])

    return thread_function(worker)


def compile_deviate(element: Any) -> Any:
    """`masking.deviation` from a centre; see `worker.compile_worker`."""
    n_fields, source = len(DEVIATE_FIELDS), fingerprint()

    def worker(words):  # type: ignore[no-untyped-def]
        source  # noqa: B018 (part of the key in Numba's cache)
        fields = carray(words, n_fields)
        size = fields[layout.FEATURES]
        x = carray(pointer(fields[layout.X], element), (size,))
        center = carray(pointer(fields[layout.CENTER], types.float32), (size,))
        out = carray(pointer(fields[layout.DEVIATION], element), (size,))
        start, stop = own_outputs(size, thread_number(), thread_count())
        for j in range(start, stop):
            out[j] = narrow(widen(x[j]) - center[j], x[j])

    return thread_function(worker)


def compile_add(element: Any) -> Any:
    """The sum of two vectors, by the first thread; see `worker.compile_worker`."""
    n_fields, source = len(ADD_FIELDS), fingerprint()

    def worker(words):  # type: ignore[no-untyped-def]
        source  # noqa: B018 (part of the key in Numba's cache)
        fields = carray(words, n_fields)
        size = fields[layout.LENGTH_OF_SUM]
        one = carray(pointer(fields[layout.ONE], element), (size,))
        other = carray(pointer(fields[layout.OTHER], element), (size,))
        out = carray(pointer(fields[layout.SUM], element), (size,))
        for j in range(size if thread_number() == 0 else 0):
            out[j] = narrow(widen(one[j]) + widen(other[j]), one[j])

    return thread_function(worker)


def compile_gate(element: Any) -> Any:
    """`block_reference.gated`, a range of the features for each thread; see `worker.compile_worker`."""
    n_fields, source = len(GATE_FIELDS), fingerprint()

    def worker(words):  # type: ignore[no-untyped-def]
        source  # noqa: B018 (part of the key in Numba's cache)
        fields = carray(words, n_fields)
        size, thread = fields[layout.GATE_FEATURES], thread_number()
        gate = carray(pointer(fields[layout.GATE], element), (size,))
        up = carray(pointer(fields[layout.UP], element), (size,))
        out = carray(pointer(fields[layout.PRODUCT], element), (size,))
        own = fields[layout.GATE_SCRATCH] + 4 * thread * GATE_WORDS
        numbers = carray(pointer(own, types.float32), (GATE_TILE,))
        powers = carray(pointer(own + 4 * GATE_TILE, types.int32), (GATE_TILE,))
        start, stop = own_outputs(size, thread, thread_count())
        for begin in range(start, stop, GATE_TILE):
            count = min(GATE_TILE, stop - begin)
            for j in range(count):
                numbers[j] = -widen(gate[begin + j])
            _exponentials(numbers[:count], powers[:count], np.float32(0))
            for j in range(count):
                value = gate[begin + j]
                active = widen(narrow(widen(value) / (np.float32(1) + numbers[j]), value))
                out[begin + j] = narrow(active * widen(up[begin + j]), value)

    return thread_function(worker)


def compile_attend(element: Any) -> Any:
    """`block_reference.attend` on addresses, as a thread function; see `worker.compile_worker`.

    Threads turn and write the keys of different heads, and after a barrier compute the outputs of different heads.
    The number of threads changes no bit.
    """
    n_fields, source = len(ATTEND_FIELDS), fingerprint()

    def worker(words):  # type: ignore[no-untyped-def]
        source  # noqa: B018 (part of the key in Numba's cache)
        fields = carray(words, n_fields)
        heads, kv_heads, size = fields[layout.HEADS], fields[layout.KV_HEADS], fields[layout.HEAD_SIZE]
        capacity, length = fields[layout.CAPACITY], fields[layout.LENGTH]
        scale = np.float32(fields.view(np.float64)[layout.SCALE])
        q = carray(pointer(fields[layout.Q], element), (heads, size))
        k = carray(pointer(fields[layout.K], element), (kv_heads, size))
        v = carray(pointer(fields[layout.V], element), (kv_heads, size))
        cos = carray(pointer(fields[layout.COS], element), (size,))
        sin = carray(pointer(fields[layout.SIN], element), (size,))
        keys = carray(pointer(fields[layout.KEYS], element), (kv_heads, capacity, size))
        values = carray(pointer(fields[layout.VALUES], element), (kv_heads, capacity, size))
        out = carray(pointer(fields[layout.ATTENDED], element), (heads, size))
        thread, threads, tokens = thread_number(), thread_count(), length + 1
        at_sums, at_scores, at_powers, words_each = _attend_parts(size, tokens)
        own = fields[layout.SCRATCH] + 4 * thread * words_each
        query = carray(pointer(own, types.float32), (size,))
        sums = carray(pointer(own + 4 * at_sums, types.float32), (size,))
        scores = carray(pointer(own + 4 * at_scores, types.float32), (tokens,))
        powers = carray(pointer(own + 4 * at_powers, types.int32), (tokens,))

        for h in range(thread, kv_heads, threads):
            _turn(k[h], cos, sin, keys[h, length])
            for j in range(size):
                values[h, length, j] = v[h, j]
        wait_for_all(fields[layout.BARRIER], threads)

        for h in range(heads * thread // threads, heads * (thread + 1) // threads):
            group = h * kv_heads // heads
            _turn(q[h], cos, sin, out[h])
            for j in range(size):
                query[j] = widen(out[h, j]) * scale
                sums[j] = 0
            for t in range(tokens):
                scores[t] = _dot(query, keys[group, t])
            _exponentials(scores, powers, _largest(scores))
            factor = np.float32(1) / _sum(scores)
            for t in range(tokens):
                row, weight = values[group, t], scores[t] * factor
                for j in range(size):
                    sums[j] += weight * widen(row[j])
            for j in range(size):
                out[h, j] = narrow(sums[j], q[h, 0])

    return thread_function(worker)
