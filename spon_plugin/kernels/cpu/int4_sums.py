# SPDX-License-Identifier: Apache-2.0
"""Sums of rows of four-bit codes, compiled by Numba: in integers on inputs of eight bits, or in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from spon_plugin.kernels.cpu.int4_dot import NARROW, WIDE
from spon_plugin.kernels.cpu.scaled_layout import ROWS
from spon_plugin.kernels.cpu.steps import OPTIONS

# Bytes of each row that are asked for early. So many rows at once are too many streams for the processor to foresee.

DISTANCE = 256
_LARGEST = np.float32(3.4028234e38)


@njit(**OPTIONS)
def round_inputs(values: Any, rounded: Any, pairs: Any, steps: Any) -> Any:
    """Inputs as signed bytes, `ROWS` of which share a step: ``values[q] ~ steps[q // ROWS] * rounded[q]``.

    Args:
        values: float32 ``[n]``.
        rounded: int32, written, up to a multiple of four inputs.
        pairs: int16, written: `rounded` two by two.
        steps: float32, written; NaN where an input is no finite number.

    Returns:
        The sum of what the inputs have become.
    """
    total = np.float32(0)
    for block in range(0, values.size, ROWS):
        stop = min(block + ROWS, values.size)
        largest, finite = np.float32(0), True
        for q in range(block, stop):
            size = abs(values[q])
            finite &= size <= _LARGEST
            largest = max(largest, size)
        scale, step = np.float32(0), np.float32(0)
        if not finite:
            step = np.float32(np.nan)
        elif largest > 0 and np.float32(127) / largest <= _LARGEST:  # else inputs are as good as zero
            scale, step = np.float32(127) / largest, largest / np.float32(127)
        codes: Any = 0
        for q in range(block, stop):
            code = np.int32(np.rint(values[q] * scale)) if finite else np.int32(0)
            rounded[q] = code
            codes += code
        steps[block // ROWS] = step
        total += step * np.float32(codes)
    padded = (values.size + 3) // 4 * 4
    for q in range(values.size, padded):
        rounded[q] = 0
    for k in range(padded // 2):
        pairs[k] = np.int16((rounded[2 * k] & 255) | (rounded[2 * k + 1] << 8))
    return total


@njit(**OPTIONS)
def _add_portable(codes: Any, rows: Any, rounded: Any, step: Any, start: int, stop: int, out: Any) -> None:
    """Add the products of up to `ROWS` rows of codes with their inputs, for bytes ``start:stop``, in plain integers."""
    count = rows.size
    four = count - count % 4
    for q in range(0, four, 4):
        a, b, c, d = rounded[q], rounded[q + 1], rounded[q + 2], rounded[q + 3]
        w0, w1 = codes[rows[q], start:stop], codes[rows[q + 1], start:stop]
        w2, w3 = codes[rows[q + 2], start:stop], codes[rows[q + 3], start:stop]
        for j in range(w0.size):
            b0, b1, b2, b3 = np.int32(w0[j]), np.int32(w1[j]), np.int32(w2[j]), np.int32(w3[j])
            low = np.int32(a * (b0 & 15) + b * (b1 & 15) + c * (b2 & 15) + d * (b3 & 15))
            high = np.int32(a * (b0 >> 4) + b * (b1 >> 4) + c * (b2 >> 4) + d * (b3 >> 4))
            out[2 * j] += step * np.float32(low)
            out[2 * j + 1] += step * np.float32(high)
    for q in range(four, count):
        value, row = step * np.float32(rounded[q]), codes[rows[q], start:stop]
        for j in range(row.size):
            code = np.int32(row[j])
            out[2 * j] += value * np.float32(code & 15)
            out[2 * j + 1] += value * np.float32(code >> 4)


@njit(**OPTIONS)
def sum_portable(
    codes: Any, inputs: Any, first: int, last: int, rounded: Any, steps: Any, start: int, stop: int, sums: Any
) -> None:
    """Sums over the inputs ``first:last`` of codes times rounded inputs, for bytes ``start:stop``.

    Arguments are those of `sum_vectors`.
    """
    for block in range(first, last, ROWS):
        rows, begin = inputs[block : min(block + ROWS, last)], block - first
        for b in range(sums.shape[0]):
            _add_portable(codes, rows, rounded[b, begin:], steps[b, begin // ROWS], start, stop, sums[b])


@njit(**OPTIONS)
def sum_vectors(
    wide: Any, narrow: Any, codes: Any, inputs: Any, addresses: Any, first: int, last: int, rounded: Any, pairs: Any,
    steps: Any, start: int, stop: int, width: int, sums: Any,
) -> None:  # fmt: skip
    """`sum_portable` by vector intrinsics, `ROWS` rows at a time, while the rows to come are asked for.

    Args:
        wide: `int4_dot.int4_dot_wide`, or one of `int4_dot_vnni` in its place.
        narrow: likewise `int4_dot.int4_dot_narrow`.
        codes: uint8 ``[in_features, bytes]``.
        inputs: the thread's active inputs.
        addresses: of their rows and of `ROWS` more, int64.
        first: the run's first of them.
        last: where the run ends.
        rounded: the run's inputs of eight bits, int32 ``[batch, n]``.
        pairs: likewise two by two, int16 ``[batch, n / 2]``.
        steps: of each `ROWS` of them, float32 ``[batch, n / ROWS]``.
        start: the tile's first byte.
        stop: where the tile ends.
        width: bytes of a row.
        sums: float32 ``[batch, outputs]``, added to.
    """
    listed = np.int64(addresses.ctypes.data)  # signed: Numba makes a float of a signed and an unsigned integer's sum
    for block in range(first, last, ROWS):
        count = min(ROWS, last - block)
        following, begin = block + ROWS, start
        if following >= last:  # the next tile of this run, or the next run
            following, begin = (first, stop) if stop < width else (last, 0)
        where, next_rows = listed + 8 * block, listed + 8 * following
        two = (count + 1) // 2
        for b in range(sums.shape[0]):
            out, step = sums[b], steps[b, (block - first) // ROWS]
            target, values = out.ctypes.data, pairs[b].ctypes.data + (block - first)
            column = start
            while column + NARROW <= stop:
                done = column - start
                aheads, ahead = where, column + DISTANCE
                if ahead >= stop:  # past the end of these rows: the beginning of those to come
                    aheads, ahead = next_rows, ahead - stop + begin
                if column + WIDE <= stop:
                    wide(where, values, two, column, aheads, ahead, target + 8 * done, step)
                    column += WIDE
                else:
                    narrow(where, values, two, column, aheads, ahead, target + 8 * done, step)
                    column += NARROW
            if column < stop:
                rest, few = out[2 * (column - start) :], inputs[block : block + count]
                _add_portable(codes, few, rounded[b, block - first :], step, column, stop, rest)


@njit(**OPTIONS)
def _add_four(out: Any, v: Any, w0: Any, w1: Any, w2: Any, w3: Any) -> None:
    v0, v1, v2, v3 = v[0], v[1], v[2], v[3]
    for j in range(w0.size):
        b0, b1, b2, b3 = np.int32(w0[j]), np.int32(w1[j]), np.int32(w2[j]), np.int32(w3[j])
        out[2 * j] += (
            v0 * np.float32(b0 & 15) + v1 * np.float32(b1 & 15) + v2 * np.float32(b2 & 15) + v3 * np.float32(b3 & 15)
        )
        out[2 * j + 1] += (
            v0 * np.float32(b0 >> 4) + v1 * np.float32(b1 >> 4) + v2 * np.float32(b2 >> 4) + v3 * np.float32(b3 >> 4)
        )


@njit(**OPTIONS)
def sum_exact(codes: Any, index: Any, first: int, last: int, values: Any, start: int, stop: int, sums: Any) -> None:
    """Sums of ``values[b, q] * codes[index[q], start:stop]``, q from `first` to `last`, in float32."""
    four = last - (last - first) % 4
    for q in range(first, four, 4):
        w0, w1 = codes[index[q], start:stop], codes[index[q + 1], start:stop]
        w2, w3 = codes[index[q + 2], start:stop], codes[index[q + 3], start:stop]
        for b in range(values.shape[0]):
            _add_four(sums[b], values[b, q : q + 4], w0, w1, w2, w3)
    for q in range(four, last):
        row = codes[index[q], start:stop]
        for b in range(values.shape[0]):
            value, out = values[b, q], sums[b]
            for j in range(row.size):
                code = np.int32(row[j])
                out[2 * j] += value * np.float32(code & 15)
                out[2 * j + 1] += value * np.float32(code >> 4)
