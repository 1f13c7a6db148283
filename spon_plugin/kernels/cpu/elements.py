# SPDX-License-Identifier: Apache-2.0
"""Rows of any dtype read as float32 and written from it, compiled by Numba: one kernel for all dtypes of x and scales.

What is read so is small beside the weights; the kind of its elements (see `scaled_layout`) is known at run time only.
"""

from __future__ import annotations

from typing import Any

from numba import carray, njit, types

from spon_plugin.kernels.cpu import scaled_layout as layout
from spon_plugin.kernels.cpu.numba_types import BFLOAT16, narrow, pointer, widen
from spon_plugin.kernels.cpu.numba_types import FLOAT16 as HALF
from spon_plugin.kernels.cpu.steps import OPTIONS


@njit(**OPTIONS)
def read_row(address: int, kind: int, first: int, out: Any) -> None:
    """``out[j]`` is element ``first + j`` of the array at `address`."""
    size = first + out.size
    if kind == layout.FLOAT32:
        f32 = carray(pointer(address, types.float32), (size,))[first:]
        for j in range(out.size):
            out[j] = f32[j]
    elif kind == layout.BFLOAT16:
        bf16 = carray(pointer(address, BFLOAT16), (size,))[first:]
        for j in range(out.size):
            out[j] = widen(bf16[j])
    elif kind == layout.FLOAT16:
        f16 = carray(pointer(address, HALF), (size,))[first:]
        for j in range(out.size):
            out[j] = widen(f16[j])
    elif kind == layout.INT8:
        i8 = carray(pointer(address, types.int8), (size,))[first:]
        for j in range(out.size):
            out[j] = i8[j]
    elif kind == layout.UINT8:
        u8 = carray(pointer(address, types.uint8), (size,))[first:]
        for j in range(out.size):
            out[j] = u8[j]
    elif kind == layout.INT16:
        i16 = carray(pointer(address, types.int16), (size,))[first:]
        for j in range(out.size):
            out[j] = i16[j]
    elif kind == layout.INT32:
        i32 = carray(pointer(address, types.int32), (size,))[first:]
        for j in range(out.size):
            out[j] = i32[j]


@njit(**OPTIONS)
def write_row(address: int, kind: int, first: int, values: Any) -> None:
    """Round float32 `values` to elements from ``first`` on of the array at `address`."""
    size = first + values.size
    if kind == layout.FLOAT32:
        f32 = carray(pointer(address, types.float32), (size,))[first:]
        for j in range(values.size):
            f32[j] = values[j]
    elif kind == layout.BFLOAT16:
        bf16 = carray(pointer(address, BFLOAT16), (size,))[first:]
        for j in range(values.size):
            bf16[j] = narrow(values[j], bf16[j])
    else:
        f16 = carray(pointer(address, HALF), (size,))[first:]
        for j in range(values.size):
            f16[j] = narrow(values[j], f16[j])
