# SPDX-License-Identifier: Apache-2.0
"""What each thread of the CPU kernels for weights with scales does, compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from spon_plugin.kernels.cpu import scaled_layout as layout
from spon_plugin.kernels.cpu.barrier import wait_for_all
from spon_plugin.kernels.cpu.elements import read_row, write_row
from spon_plugin.kernels.cpu.int4_dot import int4_dot_narrow, int4_dot_wide
from spon_plugin.kernels.cpu.int4_dot_vnni import int4_dot_256, int4_dot_256_twice, int4_dot_512
from spon_plugin.kernels.cpu.int4_sums import round_inputs, sum_exact, sum_portable, sum_vectors
from spon_plugin.kernels.cpu.numba_types import BFLOAT16, FLOAT16, pointer, prefetch, widen
from spon_plugin.kernels.cpu.rows_dot import rows_dot
from spon_plugin.kernels.cpu.scaled_layout import (
    FIELDS,
    INTEGERS,
    NOTHING,
    ROWS,
    RUN,
    SUM_FP8,
    SUM_INT4_AVX2,
    SUM_INT4_AVX512_VNNI,
    SUM_INT4_AVX_VNNI,
    SUM_INT8,
    VECTORS,
)
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

AHEAD = 1024  # bytes at the start of a row that are asked for early

_scratch_parts = njit(layout.scratch_parts)


@njit(**OPTIONS)
def _sort_by_group(inputs: Any, group_of_row: Any, places: Any, order: Any) -> None:
    """`inputs` in the order of their groups, and among themselves as they were, into `order`."""
    places[:] = 0
    for q in range(inputs.size):
        places[group_of_row[inputs[q]] + 1] += 1
    for g in range(1, places.size):
        places[g] += places[g - 1]
    for q in range(inputs.size):
        group = group_of_row[inputs[q]]
        order[places[group]] = inputs[q]
        places[group] += 1


@njit(**OPTIONS)
def _end_of_run(inputs: Any, first: int, last: int, group_of_row: Any, ordered: int, stop: int) -> int:
    """Where the run of inputs that begins at `first` ends: with its group, which ends before input `stop`."""
    end = first + 1
    if ordered:
        group = group_of_row[inputs[first]]
        while end < last and group_of_row[inputs[end]] == group:
            end += 1
    else:
        while end < last and inputs[end] < stop:
            end += 1
    return end


@njit(**OPTIONS)
def _add_scaled(part: Any, sums: Any, scale: Any, shift: Any) -> None:
    """``part += (sums - shift) * scale``, elements of any format; zeros are left in sums for the next group."""
    for j in range(part.size):
        part[j] += (sums[j] - shift) * widen(scale[j])
        sums[j] = 0


@njit(**OPTIONS)
def _add_scaled_by(address: int, kind: int, first: int, part: Any, sums: Any, shift: Any) -> None:
    """`_add_scaled` by the elements from `first` on of the scales at `address`."""
    size = first + part.size
    if kind == layout.FLOAT32:
        _add_scaled(part, sums, carray(pointer(address, types.float32), (size,))[first:], shift)
    elif kind == layout.BFLOAT16:
        _add_scaled(part, sums, carray(pointer(address, BFLOAT16), (size,))[first:], shift)
    else:
        _add_scaled(part, sums, carray(pointer(address, FLOAT16), (size,))[first:], shift)


@njit(**OPTIONS)
def _add_shifted(part: Any, sums: Any, scale: Any, zeros: Any, total: Any) -> None:
    """``part += (sums - zeros * total) * scale``, `total` that of the inputs; zeros are left in sums."""
    for j in range(part.size):
        part[j] += (sums[j] - zeros[j] * total) * scale[j]
        sums[j] = 0


@njit(**OPTIONS)
def _ask_for(address: int, kind: int, first: int, count: int) -> None:
    """Ask for the first elements of a row of scales, which are read once the codes have been."""
    size = 4 if kind == layout.FLOAT32 else 2
    row = carray(pointer(address, types.uint8), (size * (first + count),))[size * first :]
    for j in range(0, min(row.size, AHEAD), 64):
        prefetch(row, j)


@njit(**OPTIONS)
def _total(values: Any) -> Any:
    total = np.float32(0)
    for q in range(values.size):
        total += values[q]
    return total


def compile_scaled_worker(kind: str, code: Any) -> Any:
    """The thread function ``void (int64_t *fields)``, as a Numba `cfunc`; see `worker.compile_worker`.

    Threads share the list of active inputs evenly, in the order of their groups. A run of a thread's inputs that share
    a group is summed up over a tile of the outputs before scales and zero points are applied.

    Args:
        kind: what is summed and how, of `scaled_layout`.
        code: type of the codes, of `numba_types`.
    """
    # Numba keeps what it compiles by the values of these: no functions, whose values differ between processes.
    n_fields, source = len(FIELDS), fingerprint()
    whole_bytes = kind in (SUM_INT8, SUM_FP8)
    rounds = kind in INTEGERS
    avx512_vnni, avx_vnni, avx2 = (kind == k for k in (SUM_INT4_AVX512_VNNI, SUM_INT4_AVX_VNNI, SUM_INT4_AVX2))
    vectors = kind in VECTORS
    per_byte = 1 if whole_bytes else 2
    most = RUN if rounds else 1 << 30

    def worker(words):  # type: ignore[no-untyped-def]
        source  # noqa: B018 (part of the key in Numba's cache)
        fields = carray(words, n_fields)
        batch, in_features, out_features = fields[layout.BATCH], fields[layout.IN_FEATURES], fields[layout.OUT_FEATURES]
        tile, groups, per_channel = fields[layout.TILE], fields[layout.GROUPS], fields[layout.PER_CHANNEL]
        codes = carray(pointer(fields[layout.CODES], code), (in_features, fields[layout.CODE_STRIDE]))
        ordered, group_size = fields[layout.GROUP_OF_ROW] != 0, fields[layout.GROUP_SIZE]
        group_of_row = carray(pointer(fields[layout.GROUP_OF_ROW], types.int32), (in_features,))
        threshold = carray(pointer(fields[layout.THRESHOLD], types.float32), (in_features if per_channel else 1,))
        has_zeros, has_offsets = fields[layout.ZERO_KIND] != NOTHING, fields[layout.OFFSET_KIND] != NOTHING
        thread, threads = thread_number(), thread_count()

        outputs = tile * per_byte
        parts = _scratch_parts(batch, in_features, groups, outputs)
        scratch = fields[layout.SCRATCH]
        own = scratch + 4 * ((threads * batch * out_features + 15) // 16 * 16 + thread * fields[layout.THREAD_WORDS])
        partial = carray(pointer(scratch, types.float32), (threads, batch, out_features))
        addresses = carray(pointer(own, types.int64), (in_features + ROWS,))
        x = carray(pointer(own + 4 * parts[1], types.float32), (batch, in_features))
        values = carray(pointer(own + 4 * parts[2], types.float32), (batch, in_features))
        active = carray(pointer(own + 4 * parts[3], types.int32), (in_features,))
        index = carray(pointer(own + 4 * parts[4], types.int32), (in_features + ROWS,))
        order = carray(pointer(own + 4 * parts[5], types.int32), (in_features + ROWS,))
        blocks = carray(pointer(own + 4 * parts[6], types.int32), (parts[7] - parts[6],))
        places = carray(pointer(own + 4 * parts[7], types.int32), (groups + 1,))
        scale_rows = carray(pointer(own + 4 * parts[8], types.float32), (3, outputs))
        sums = carray(pointer(own + 4 * parts[9], types.float32), (batch, outputs))
        rounded = carray(pointer(own + 4 * parts[10], types.int32), (batch, RUN))
        pairs = carray(pointer(own + 4 * parts[11], types.int16), (batch, RUN))
        steps = carray(pointer(own + 4 * parts[12], types.float32), (batch, RUN // ROWS))
        totals = carray(pointer(own + 4 * parts[13], types.float32), (2, batch))

        for b in range(batch):
            read_row(fields[layout.X], fields[layout.X_KIND], b * in_features, x[b])
        mark_active(x, threshold, per_channel, active)
        if ordered:
            found = share(active, blocks, 0, 1, index)
            _sort_by_group(found, group_of_row, places, order)
            begin = found.size * thread // threads
            count = found.size * (thread + 1) // threads - begin
            for q in range(count):
                index[q] = order[begin + q]
        else:
            found = share(active, blocks, thread, threads, index)
            count = found.size
            for q in range(count):
                index[q] = found[q]
        for q in range(ROWS):
            index[count + q] = index[count - 1] if count else 0
        if vectors:
            for q in range(count + ROWS):
                addresses[q] = fields[layout.CODES] + np.int64(index[q]) * fields[layout.CODE_STRIDE]
        gather_values(x, threshold, per_channel, index[:count], values)
        own_sums = partial[thread]
        own_sums[:] = 0

        width = (out_features + per_byte - 1) // per_byte  # bytes of a row
        middle = np.float32(0 if whole_bytes else 8)
        sums[:] = 0
        first = 0
        while first < count:
            group = np.int64(group_of_row[index[first]]) if ordered else index[first] // group_size
            stop_of_group = (group + 1) * group_size
            last = _end_of_run(index, first, min(count, first + most), group_of_row, ordered, stop_of_group)
            for b in range(batch):
                totals[0, b] = totals[1, b] = _total(values[b, first:last])
                if rounds:
                    totals[0, b] = round_inputs(values[b, first:last], rounded[b], pairs[b], steps[b])
            for start in range(0, width, tile):
                stop = min(start + tile, width)
                begin, end = per_byte * start, min(per_byte * stop, out_features)
                _ask_for(
                    fields[layout.SCALES],
                    fields[layout.SCALE_KIND],
                    group * fields[layout.SCALE_STRIDE] + begin,
                    end - begin,
                )
                if whole_bytes:
                    rows_dot(codes, index, values, first, last, last, start, stop, sums, 0)
                elif avx512_vnni:
                    sum_vectors(
                        int4_dot_512, int4_dot_256,
                        codes, index, addresses, first, last, rounded, pairs, steps, start, stop, width, sums,
                    )  # fmt: skip
                elif avx_vnni:
                    sum_vectors(
                        int4_dot_256_twice, int4_dot_256,
                        codes, index, addresses, first, last, rounded, pairs, steps, start, stop, width, sums,
                    )  # fmt: skip
                elif avx2:
                    sum_vectors(
                        int4_dot_wide, int4_dot_narrow,
                        codes, index, addresses, first, last, rounded, pairs, steps, start, stop, width, sums,
                    )  # fmt: skip
                elif rounds:
                    sum_portable(codes, index, first, last, rounded, steps, start, stop, sums)
                else:
                    sum_exact(codes, index, first, last, values, start, stop, sums)
                scale, zeros, offset = scale_rows[0, : end - begin], scale_rows[1, : end - begin], scale_rows[2]
                scales, scale_kind = fields[layout.SCALES], fields[layout.SCALE_KIND]
                at = group * fields[layout.SCALE_STRIDE] + begin
                if has_zeros:
                    read_row(scales, scale_kind, at, scale)
                    zeros_at = group * fields[layout.ZERO_STRIDE] + begin
                    read_row(fields[layout.ZEROS], fields[layout.ZERO_KIND], zeros_at, zeros)
                if has_offsets:
                    offsets_at = group * fields[layout.OFFSET_STRIDE] + begin
                    read_row(fields[layout.OFFSETS], fields[layout.OFFSET_KIND], offsets_at, offset[: end - begin])
                for b in range(batch):
                    part = own_sums[b, begin:end]
                    if has_zeros:
                        _add_shifted(part, sums[b], scale, zeros, totals[0, b])
                    else:
                        _add_scaled_by(scales, scale_kind, at, part, sums[b], middle * totals[0, b])
                    sums[b, end - begin : per_byte * (stop - start)] = 0  # of half a byte that is no output
                    if has_offsets:
                        for j in range(part.size):
                            part[j] += offset[j] * totals[1, b]
            first = last
        wait_for_all(fields[layout.BARRIER], threads)

        start, stop = own_outputs(out_features, thread, threads)
        for begin in range(start, stop, outputs):
            end = min(begin + outputs, stop)
            bias = scale_rows[0, : end - begin]
            bias[:] = 0
            read_row(fields[layout.BIAS], fields[layout.BIAS_KIND], begin, bias)
            for b in range(batch):
                total_row = partial[0, b, begin:end]
                for t in range(1, threads):
                    other = partial[t, b, begin:end]
                    for j in range(total_row.size):
                        total_row[j] += other[j]
                for j in range(total_row.size):
                    total_row[j] += bias[j]
                write_row(fields[layout.Y], fields[layout.X_KIND], b * fields[layout.Y_STRIDE] + begin, total_row)

    return thread_function(worker)
