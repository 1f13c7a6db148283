# SPDX-License-Identifier: Apache-2.0
"""What each thread does to multiply many rows by a weight in any format, compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from spon_plugin.kernels.cpu import panels_layout
from spon_plugin.kernels.cpu import scaled_layout as layout
from spon_plugin.kernels.cpu.barrier import wait_for_all
from spon_plugin.kernels.cpu.elements import read_row, write_row
from spon_plugin.kernels.cpu.numba_types import FLOAT8, pointer, prefetch_far, widen
from spon_plugin.kernels.cpu.panel_tile import (
    COLUMNS,
    pack_bfloat16,
    pack_float8,
    pack_float16,
    pack_float32,
    pack_int4,
    pack_int8,
    tile_4,
    tile_5,
    tile_6,
)
from spon_plugin.kernels.cpu.panels_layout import (
    CODE_BITS,
    CODE_FLOAT8,
    CODE_KIND,
    CODE_NIBBLES,
    DEPTH,
    FIELDS,
    GAP,
    PADDED,
    PANEL,
    STRIPS,
)
from spon_plugin.kernels.cpu.scaled_layout import NOTHING
from spon_plugin.kernels.cpu.sources import fingerprint
from spon_plugin.kernels.cpu.steps import OPTIONS, thread_count, thread_function, thread_number

AHEAD = 16  # rows of a weight that are asked for before they are read
CHUNK = 192  # rows of x whose inputs of a panel stay in the second cache

_scratch_parts = njit(panels_layout.scratch_parts)
_blocks = njit(panels_layout.blocks)


@njit(**OPTIONS)
def _pack_inputs(fields: Any, rows: int, first: int, row: Any, packed: Any) -> None:
    """``S(x)`` of the inputs from `first` on, as many as `row` has, into ``packed[block][input][row of the block]``."""
    batch, depth = fields[layout.BATCH], row.size
    masks, per_channel = fields[layout.THRESHOLD] != 0, fields[layout.PER_CHANNEL]
    threshold = carray(
        pointer(fields[layout.THRESHOLD], types.float32), (fields[layout.IN_FEATURES] if per_channel else 1,)
    )
    count = _blocks(rows)
    for block in range(count):
        begin, end = rows * block // count, rows * (block + 1) // count
        size = end - begin
        for t in range(begin, end):
            if t < batch:
                read_row(fields[layout.X], fields[layout.X_KIND], t * fields[layout.IN_FEATURES] + first, row)
                if masks and per_channel:
                    for k in range(depth):
                        row[k] = np.float32(0) if abs(row[k]) <= threshold[first + k] else row[k]
                elif masks:
                    for k in range(depth):
                        row[k] = np.float32(0) if abs(row[k]) <= threshold[0] else row[k]
            else:
                row[:] = 0
            at = begin * depth + t - begin
            for k in range(depth):
                packed[at + k * size] = row[k]


@njit(**OPTIONS)
def read_scales(fields: Any, group: int, first: int, count: int, scales: Any) -> None:
    """Scales, zero points and offsets of a group for some outputs."""
    at = group * fields[layout.SCALE_STRIDE] + first
    read_row(fields[layout.SCALES], fields[layout.SCALE_KIND], at, scales[0, :count])
    if fields[layout.ZERO_KIND] != NOTHING:
        at = group * fields[layout.ZERO_STRIDE] + first
        read_row(fields[layout.ZEROS], fields[layout.ZERO_KIND], at, scales[1, :count])
    if fields[layout.OFFSET_KIND] != NOTHING:
        at = group * fields[layout.OFFSET_STRIDE] + first
        read_row(fields[layout.OFFSETS], fields[layout.OFFSET_KIND], at, scales[2, :count])


@njit(**OPTIONS)
def rest_of_row(address: int, kind: int, first: int, count: int, scales: Any, row: Any) -> None:
    """What `pack` leaves: a strip that the weight does not fill, with zeros for the outputs that are none.

    Args:
        address: of the weight's row.
        kind: of its elements.
        first: output of the strip.
        count: outputs of the strip that are there.
        scales: scales, zero points and offsets of the strip.
        row: of the strip.
    """
    row[:] = 0
    if kind in (CODE_NIBBLES, CODE_FLOAT8):
        codes = carray(pointer(address, FLOAT8), (first + count,))
        for j in range(count):
            if kind == CODE_FLOAT8:
                row[j] = widen(codes[first + j])
            else:
                row[j] = np.float32((codes[(first + j) // 2] >> 4 * ((first + j) % 2)) & 15)
    else:
        read_row(address, kind, first, row[:count])
    if kind in (CODE_NIBBLES, CODE_FLOAT8, layout.INT8):
        for j in range(count):
            row[j] = (row[j] - scales[1, j]) * scales[0, j] + scales[2, j]


@njit(**OPTIONS)
def _pack_panel(
    fields: Any, first: int, depth: int, begin: int, end: int, scales: Any, panel: Any, panel_at: int, scales_at: int
) -> None:
    """Decode outputs ``begin:end`` of inputs from `first` on into ``panel[strip][input][COLUMNS]``."""
    kind, stride, bits = fields[CODE_KIND], fields[layout.CODE_STRIDE], fields[CODE_BITS]
    group_of_row = carray(pointer(fields[layout.GROUP_OF_ROW], types.int32), (fields[layout.IN_FEATURES],))
    strips, width, apart = (end - begin) // COLUMNS, (end - begin) * bits // 8, 4 * COLUMNS * (depth + GAP)
    whole = strips * COLUMNS
    held = np.int64(-1)
    for k in range(depth):
        i = first + k
        if fields[layout.SCALE_KIND] != NOTHING:
            group = np.int64(group_of_row[i]) if fields[layout.GROUP_OF_ROW] != 0 else i // fields[layout.GROUP_SIZE]
            if group != held:
                held = group
                read_scales(fields, group, begin, end - begin, scales)
        row = fields[layout.CODES] + i * stride
        source, out = row + begin * bits // 8, panel_at + 4 * COLUMNS * k
        for byte in range(0, width, 64):
            prefetch_far(source + AHEAD * stride + byte)
        if kind == layout.FLOAT32:
            pack_float32(source, strips, scales_at, out, apart)
        elif kind == layout.BFLOAT16:
            pack_bfloat16(source, strips, scales_at, out, apart)
        elif kind == layout.FLOAT16:
            pack_float16(source, strips, scales_at, out, apart)
        elif kind == layout.INT8:
            pack_int8(source, strips, scales_at, out, apart)
        elif kind == CODE_FLOAT8:
            pack_float8(source, strips, scales_at, out, apart)
        else:
            pack_int4(source, strips, scales_at, out, apart)
        if begin + whole < end:
            at = (strips * (depth + GAP) + k) * COLUMNS
            rest_of_row(row, kind, begin + whole, end - begin - whole, scales[:, whole:], panel[at : at + COLUMNS])


@njit(**OPTIONS)
def _multiply(x: int, rows: int, depth: int, panel: int, strips: int, sums: int) -> None:
    """Add a panel's products to sums ``[strip][row][COLUMNS]``; the first and the last four are addresses or counts."""
    count = _blocks(rows)
    per_chunk = max(1, CHUNK * count // rows)
    for chunk in range(0, count, per_chunk):
        for strip in range(strips):
            weights, out = panel + 4 * COLUMNS * (depth + GAP) * strip, sums + 4 * COLUMNS * rows * strip
            for block in range(chunk, min(chunk + per_chunk, count)):
                begin = rows * block // count
                size = rows * (block + 1) // count - begin
                inputs, target = x + 4 * depth * begin, out + 4 * COLUMNS * begin
                if size == 6:
                    tile_6(inputs, weights, target, depth)
                elif size == 5:
                    tile_5(inputs, weights, target, depth)
                else:
                    tile_4(inputs, weights, target, depth)


@njit(**OPTIONS)
def finish(fields: Any, rows: int, columns: int, begin: int, end: int, sums: Any, bias: Any, out: Any) -> None:
    """Outputs ``begin:end`` of all rows: the bias added, and rounded. Sums are ``[strip][row][columns]``."""
    count = end - begin
    bias = bias[:count]
    bias[:] = 0
    read_row(fields[layout.BIAS], fields[layout.BIAS_KIND], begin, bias)
    for t in range(fields[layout.BATCH]):
        for start in range(0, count, columns):
            at = (start // columns * rows + t) * columns
            for j in range(min(columns, count - start)):
                out[start + j] = sums[at + j] + bias[start + j]
        write_row(fields[layout.Y], fields[layout.X_KIND], t * fields[layout.Y_STRIDE] + begin, out[:count])


def compile_panels_worker() -> Any:
    """The thread function ``void (int64_t *fields)``, as a Numba `cfunc`; see `worker.compile_worker`.

    Threads share the outputs, so that the sums of one are the same for any number of threads; they are in the order of
    the inputs, whatever the other rows are. A panel of the weight, `DEPTH` inputs of `PANEL` outputs, is decoded once
    and multiplied by all rows of x while the second cache holds it; its strips, one after the other, lie in the first.
    """
    n_fields, source = len(FIELDS), fingerprint()

    def worker(words):  # type: ignore[no-untyped-def]
        source  # noqa: B018 (part of the key in Numba's cache)
        fields = carray(words, n_fields)
        in_features, out_features = fields[layout.IN_FEATURES], fields[layout.OUT_FEATURES]
        kind, rows, most = fields[CODE_KIND], fields[PADDED], fields[STRIPS]
        thread, threads = thread_number(), thread_count()
        parts = _scratch_parts(rows, most, COLUMNS)
        shared = (rows * in_features + 15) // 16 * 16
        packed = carray(pointer(fields[layout.SCRATCH], types.float32), (rows * in_features,))
        own = fields[layout.SCRATCH] + 4 * (shared + thread * parts[5])
        panel = carray(pointer(own, types.float32), ((DEPTH + GAP) * PANEL,))
        scales = carray(pointer(own + 4 * parts[1], types.float32), (3, PANEL))
        row = carray(pointer(own + 4 * parts[2], types.float32), (max(DEPTH, most * COLUMNS),))
        bias = carray(pointer(own + 4 * parts[3], types.float32), (most * COLUMNS,))
        sums = carray(pointer(own + 4 * parts[4], types.float32), (most * rows * COLUMNS,))

        chunks = (in_features + DEPTH - 1) // DEPTH
        for chunk in range(thread, chunks, threads):
            first = chunk * DEPTH
            depth = min(DEPTH, in_features - first)
            _pack_inputs(fields, rows, first, row[:depth], packed[rows * first :])
        wait_for_all(fields[layout.BARRIER], threads)
        scales[1] = np.float32(8 if kind == CODE_NIBBLES else 0)
        scales[2] = 0

        strips = (out_features + COLUMNS - 1) // COLUMNS
        last = strips * (thread + 1) // threads
        for block in range(strips * thread // threads, last, most):
            stop = min(block + most, last)
            used = sums[: (stop - block) * rows * COLUMNS]
            for j in range(used.size):
                used[j] = 0
            for first in range(0, in_features, DEPTH):
                depth = min(DEPTH, in_features - first)
                for strip in range(block, stop, PANEL // COLUMNS):
                    past = min(strip + PANEL // COLUMNS, stop)
                    begin, end = strip * COLUMNS, min(past * COLUMNS, out_features)
                    _pack_panel(fields, first, depth, begin, end, scales, panel, own, own + 4 * parts[1])
                    x = fields[layout.SCRATCH] + 4 * rows * first
                    target = own + 4 * (parts[4] + (strip - block) * rows * COLUMNS)
                    _multiply(x, rows, depth, own, past - strip, target)
            finish(fields, rows, COLUMNS, block * COLUMNS, min(stop * COLUMNS, out_features), sums, bias, row)

    return thread_function(worker)
