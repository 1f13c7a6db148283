# SPDX-License-Identifier: Apache-2.0
"""`panels_worker` in bfloat16, for processors that multiply it: what each thread does, compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from spon_plugin.kernels.cpu import panels_layout, panels_worker
from spon_plugin.kernels.cpu import scaled_layout as layout
from spon_plugin.kernels.cpu.barrier import wait_for_all
from spon_plugin.kernels.cpu.numba_types import BFLOAT16, narrow, pointer, prefetch_far, widen
from spon_plugin.kernels.cpu.panel_tile_bf16 import (
    configure,
    has_tiles,
    pack_bfloat16,
    pack_float8,
    pack_float8_shifted,
    pack_int4,
    pack_int4_shifted,
    pack_int8,
    pack_int8_shifted,
    pairs_8,
    release,
    tiles_1,
    tiles_2,
)
from spon_plugin.kernels.cpu.panels_layout import BF16_COLUMNS as COLUMNS
from spon_plugin.kernels.cpu.panels_layout import (
    BF16_DEPTH,
    BF16_PANEL,
    CODE_BITS,
    CODE_FLOAT8,
    CODE_KIND,
    FIELDS,
    PADDED,
    PANEL,
    STRIPS,
)
from spon_plugin.kernels.cpu.panels_layout import BF16_ROWS as ROWS
from spon_plugin.kernels.cpu.panels_layout import BF16_STEP as STEP
from spon_plugin.kernels.cpu.panels_worker import AHEAD, CHUNK
from spon_plugin.kernels.cpu.scaled_layout import NOTHING
from spon_plugin.kernels.cpu.sources import fingerprint
from spon_plugin.kernels.cpu.steps import OPTIONS, thread_count, thread_function, thread_number

_STRIP = 2 * BF16_DEPTH * COLUMNS  # bytes of a strip of a panel
_ROW = 2 * STEP  # bytes of a row of a tile
_WIDTH = COLUMNS // 2  # outputs of a tile

_scratch_parts = njit(panels_layout.bf16_scratch_parts)


@njit(**OPTIONS)
def _pack_inputs(fields: Any, rows: int, first: int, depth: int, packed: Any) -> None:
    """``S(x)`` of the inputs from `first` on into ``packed[tile of rows, step, ROWS, STEP]``, zeros behind."""
    batch, in_features = fields[layout.BATCH], fields[layout.IN_FEATURES]
    masks, per_channel = fields[layout.THRESHOLD] != 0, fields[layout.PER_CHANNEL]
    threshold = carray(pointer(fields[layout.THRESHOLD], types.float32), (in_features if per_channel else 1,))
    x = carray(pointer(fields[layout.X], BFLOAT16), (batch * in_features,))
    for t in range(rows):
        for step in range(packed.shape[1]):
            out, begin = packed[t // ROWS, step, t % ROWS], step * STEP
            count = min(STEP, depth - begin) if t < batch else 0
            row = x[t * in_features + first + begin : t * in_features + first + begin + count]
            if masks and per_channel:
                for k in range(count):
                    out[k] = np.uint16(0) if abs(widen(row[k])) <= threshold[first + begin + k] else row[k]
            elif masks:
                for k in range(count):
                    out[k] = np.uint16(0) if abs(widen(row[k])) <= threshold[0] else row[k]
            else:
                for k in range(count):
                    out[k] = row[k]
            out[count:] = 0


@njit(**OPTIONS)
def _pack_panel(
    fields: Any,
    first: int,
    depth: int,
    begin: int,
    end: int,
    scales: Any,
    at: int,
    rest: Any,
    panel: Any,
    address: int,
) -> None:
    """Decode outputs ``begin:end`` of inputs from `first` on into ``panel[strip, step, tile, STEP / 2, _WIDTH, 2]``."""
    kind, stride, bits = fields[CODE_KIND], fields[layout.CODE_STRIDE], fields[CODE_BITS]
    group_of_row = carray(pointer(fields[layout.GROUP_OF_ROW], types.int32), (fields[layout.IN_FEATURES],))
    strips, width = (end - begin) // COLUMNS, (end - begin) * bits // 8
    whole, shifted = strips * COLUMNS, fields[layout.ZERO_KIND] != NOTHING or fields[layout.OFFSET_KIND] != NOTHING
    held = np.full(2, -1, np.int64)
    at_2 = at + 4 * scales[0].size
    for pair in range((depth + STEP - 1) // STEP * STEP // 2):
        step, place = pair // (STEP // 2), pair % (STEP // 2)
        if 2 * pair >= depth:  # zeros that make the step up
            panel[:, step, :, place] = 0
            continue
        i, two = first + 2 * pair, 2 * pair + 1 < depth
        if fields[layout.SCALE_KIND] != NOTHING:
            for h in range(1 + two):
                number = i + h
                group = number // fields[layout.GROUP_SIZE]
                if fields[layout.GROUP_OF_ROW] != 0:
                    group = np.int64(group_of_row[number])
                if group != held[h]:
                    held[h] = group
                    panels_worker.read_scales(fields, group, begin, end - begin, scales[h])
        row = fields[layout.CODES] + i * stride
        source, out = row + begin * bits // 8, address + 2 * (step * STEP * COLUMNS + place * 2 * _WIDTH)
        other = source + stride if two else 0
        for byte in range(0, width, 64):
            prefetch_far(source + AHEAD * stride + byte)
            prefetch_far(source + (AHEAD + 1) * stride + byte)
        if kind == layout.BFLOAT16:
            pack_bfloat16(source, other, strips, out, _STRIP)
        elif kind == layout.INT8 and shifted:
            pack_int8_shifted(source, other, strips, at, at_2, out, _STRIP)
        elif kind == layout.INT8:
            pack_int8(source, other, strips, at, at_2, out, _STRIP)
        elif kind == CODE_FLOAT8 and shifted:
            pack_float8_shifted(source, other, strips, at, at_2, out, _STRIP)
        elif kind == CODE_FLOAT8:
            pack_float8(source, other, strips, at, at_2, out, _STRIP)
        elif shifted:
            pack_int4_shifted(source, other, strips, at, at_2, out, _STRIP)
        else:
            pack_int4(source, other, strips, at, at_2, out, _STRIP)
        if begin + whole < end:
            target = panel[strips, step, :, place]
            target[:] = 0
            for h in range(1 + two):
                panels_worker.rest_of_row(
                    row + h * stride, kind, begin + whole, end - begin - whole, scales[h, :, whole:], rest
                )
                for j in range(COLUMNS):
                    target[j // _WIDTH, j % _WIDTH, h] = narrow(rest[j], target[0, 0, 0])


@njit(**OPTIONS)
def _multiply_by_tiles(x: int, rows: int, steps: int, panel: int, strips: int, sums: int) -> None:
    """Add a panel's products to sums ``[strip][row][COLUMNS]``; the first and the last four are addresses or counts."""
    configure()
    for chunk in range(0, rows, CHUNK):
        last = min(chunk + CHUNK, rows)
        for strip in range(strips):
            weights, out = panel + _STRIP * strip, sums + 4 * COLUMNS * rows * strip
            row = chunk
            while row + 2 * ROWS <= last:
                tiles_2(x + row * steps * _ROW, weights, out + 4 * COLUMNS * row, steps)
                row += 2 * ROWS
            if row < last:
                tiles_1(x + row * steps * _ROW, weights, out + 4 * COLUMNS * row, steps)
    release()


@njit(**OPTIONS)
def _multiply_by_pairs(x: int, rows: int, steps: int, panel: int, strips: int, sums: int) -> None:
    """`_multiply_by_tiles` without tiles."""
    for chunk in range(0, rows, CHUNK):
        for strip in range(strips):
            weights, out = panel + _STRIP * strip, sums + 4 * COLUMNS * rows * strip
            for row in range(chunk, min(chunk + CHUNK, rows), ROWS):
                inputs, target = x + row * steps * _ROW, out + 4 * COLUMNS * row
                pairs_8(inputs, weights, target, steps)
                pairs_8(inputs + ROWS // 2 * _ROW, weights, target + ROWS // 2 * 4 * COLUMNS, steps)


_multiply = _multiply_by_tiles if has_tiles() else _multiply_by_pairs


def compile_panels_bf16_worker() -> Any:
    """The thread function ``void (int64_t *fields)``, as a Numba `cfunc`: that of `compile_panels_worker`.

    x is bfloat16, decoded weights are rounded to it, and sums are float32 until they are written.
    """
    n_fields, source = len(FIELDS), f"{fingerprint()} {has_tiles()}"

    def worker(words):  # type: ignore[no-untyped-def]
        source  # noqa: B018 (part of the key in Numba's cache)
        fields = carray(words, n_fields)
        in_features, out_features = fields[layout.IN_FEATURES], fields[layout.OUT_FEATURES]
        rows, most = fields[PADDED], fields[STRIPS]
        thread, threads = thread_number(), thread_count()
        parts = _scratch_parts(rows, in_features, most)
        own = fields[layout.SCRATCH] + 4 * (parts[0] + thread * parts[6])
        panel = carray(pointer(own, BFLOAT16), (BF16_PANEL // COLUMNS, BF16_DEPTH // STEP, 2, STEP // 2, _WIDTH, 2))
        scales = carray(pointer(own + 4 * parts[1], types.float32), (2, 3, PANEL))
        rest = carray(pointer(own + 4 * parts[2], types.float32), (COLUMNS,))
        row = carray(pointer(own + 4 * parts[3], types.float32), (most * COLUMNS,))
        bias = carray(pointer(own + 4 * parts[4], types.float32), (most * COLUMNS,))
        sums = carray(pointer(own + 4 * parts[5], types.float32), (most * rows * COLUMNS,))

        chunks = (in_features + BF16_DEPTH - 1) // BF16_DEPTH
        for chunk in range(thread, chunks, threads):
            first = chunk * BF16_DEPTH
            depth = min(BF16_DEPTH, in_features - first)
            inputs = pointer(fields[layout.SCRATCH] + 2 * rows * first, BFLOAT16)
            packed = carray(inputs, (rows // ROWS, (depth + STEP - 1) // STEP, ROWS, STEP))
            _pack_inputs(fields, rows, first, depth, packed)
        wait_for_all(fields[layout.BARRIER], threads)
        scales[:, 1] = np.float32(8 if fields[CODE_KIND] == panels_layout.CODE_NIBBLES else 0)
        scales[:, 2] = 0

        strips = (out_features + COLUMNS - 1) // COLUMNS
        last = strips * (thread + 1) // threads
        for block in range(strips * thread // threads, last, most):
            stop = min(block + most, last)
            used = sums[: (stop - block) * rows * COLUMNS]
            for j in range(used.size):
                used[j] = 0
            for first in range(0, in_features, BF16_DEPTH):
                depth = min(BF16_DEPTH, in_features - first)
                for strip in range(block, stop, BF16_PANEL // COLUMNS):
                    past = min(strip + BF16_PANEL // COLUMNS, stop)
                    begin, end = strip * COLUMNS, min(past * COLUMNS, out_features)
                    _pack_panel(fields, first, depth, begin, end, scales, own + 4 * parts[1], rest, panel, own)
                    x, target = fields[layout.SCRATCH] + 2 * rows * first, parts[5] + (strip - block) * rows * COLUMNS
                    _multiply(x, rows, (depth + STEP - 1) // STEP, own, past - strip, own + 4 * target)
            finish_at = min(stop * COLUMNS, out_features)
            panels_worker.finish(fields, rows, COLUMNS, block * COLUMNS, finish_at, sums, bias, row)

    return thread_function(worker)
