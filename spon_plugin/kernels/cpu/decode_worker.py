# SPDX-License-Identifier: Apache-2.0
"""What each thread does to decode rows of a weight with scales, compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from spon_plugin.kernels.cpu import scaled_layout as layout
from spon_plugin.kernels.cpu.elements import read_row
from spon_plugin.kernels.cpu.numba_types import pointer, widen
from spon_plugin.kernels.cpu.scaled_layout import DECODE_FIELDS, NOTHING
from spon_plugin.kernels.cpu.sources import fingerprint
from spon_plugin.kernels.cpu.steps import OPTIONS, thread_count, thread_function, thread_number


@njit(**OPTIONS)
def _decode_bytes(row: Any, zero: Any, scale: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] = (widen(row[j]) - zero[j]) * scale[j]


@njit(**OPTIONS)
def _decode_nibbles(row: Any, zero: Any, scale: Any, out: Any) -> None:
    for j in range(out.size // 2):
        code = np.int32(row[j])
        out[2 * j] = (np.float32(code & 15) - zero[2 * j]) * scale[2 * j]
        out[2 * j + 1] = (np.float32(code >> 4) - zero[2 * j + 1]) * scale[2 * j + 1]
    if out.size % 2:
        last = out.size - 1
        out[last] = (np.float32(row[last // 2] & 15) - zero[last]) * scale[last]


@njit(**OPTIONS)
def _add(offset: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] += offset[j]


def compile_decode_worker(code: Any, whole_bytes: bool) -> Any:
    """The thread function ``void (int64_t *fields)``, as a Numba `cfunc`; see `worker.compile_worker`.

    Threads share the rows evenly; each is read once and written as float32.

    Args:
        code: type of the codes, of `numba_types`.
        whole_bytes: whether a code is a byte; otherwise two outputs share one.
    """
    n_fields, source, middle = len(DECODE_FIELDS), fingerprint(), np.float32(0 if whole_bytes else 8)
    per_byte = 1 if whole_bytes else 2

    def worker(words):  # type: ignore[no-untyped-def]
        source  # noqa: B018 (part of the key in Numba's cache)
        fields = carray(words, n_fields)
        first, rows, width = fields[layout.FIRST_ROW], fields[layout.ROW_COUNT], fields[layout.OUT_FEATURES]
        in_features, group_size = fields[layout.IN_FEATURES], fields[layout.GROUP_SIZE]
        codes = carray(pointer(fields[layout.CODES], code), (in_features, fields[layout.CODE_STRIDE]))
        group_of_row = carray(pointer(fields[layout.GROUP_OF_ROW], types.int32), (in_features,))
        out = carray(pointer(fields[layout.OUT], types.float32), (rows, width))
        thread, threads = thread_number(), thread_count()
        own = fields[layout.SCRATCH] + 4 * thread * ((3 * width + 15) // 16 * 16)
        scales = carray(pointer(own, types.float32), (3, width))
        scale, zero, offset = scales[0], scales[1], scales[2]
        zero[:] = middle
        held = np.int64(-1)
        for k in range(rows * thread // threads, rows * (thread + 1) // threads):
            i = first + k
            group = np.int64(group_of_row[i]) if fields[layout.GROUP_OF_ROW] != 0 else i // group_size
            if group != held:
                held = group
                read_row(fields[layout.SCALES], fields[layout.SCALE_KIND], group * fields[layout.SCALE_STRIDE], scale)
                if fields[layout.ZERO_KIND] != NOTHING:
                    read_row(fields[layout.ZEROS], fields[layout.ZERO_KIND], group * fields[layout.ZERO_STRIDE], zero)
                if fields[layout.OFFSET_KIND] != NOTHING:
                    at = group * fields[layout.OFFSET_STRIDE]
                    read_row(fields[layout.OFFSETS], fields[layout.OFFSET_KIND], at, offset)
            row = codes[i, : (width + per_byte - 1) // per_byte]
            if whole_bytes:
                _decode_bytes(row, zero, scale, out[k])
            else:
                _decode_nibbles(row, zero, scale, out[k])
            if fields[layout.OFFSET_KIND] != NOTHING:
                _add(offset, out[k])

    return thread_function(worker)
