# SPDX-License-Identifier: Apache-2.0
"""The few machine operations that the CPU kernel needs and Numba does not offer.

Numba has no bfloat16 and no float16 arithmetic on CPUs, so the kernel sees elements as bits. The type of the bits says
which format they are: uint16 is bfloat16, int16 is float16, float32 is itself; for codes of weights, int8 is an integer
and uint8 is float8 (e4m3).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BFLOAT16, FLOAT16, FLOAT32 = types.uint16, types.int16, types.float32
INT8, FLOAT8 = types.int8, types.uint8

_FLOAT, _I16, _I32 = ir.FloatType(), ir.IntType(16), ir.IntType(32)
_BYTES = ir.IntType(8).as_pointer()


def widened(builder: Any, kind: Any, value: Any) -> Any:
    """The instructions that make float32 of an element of the type `kind`, or of a vector of them, exactly."""
    b, lanes = builder, getattr(value.type, "count", 0)

    def of(scalar: Any) -> Any:
        return ir.VectorType(scalar, lanes) if lanes else scalar

    def constant(scalar: Any, number: float) -> Any:
        return ir.Constant(of(scalar), [number] * lanes if lanes else number)

    if kind == FLOAT32:
        return value
    if kind == FLOAT16:
        return b.fpext(b.bitcast(value, of(ir.HalfType())), of(_FLOAT))
    if kind == INT8:
        return b.sitofp(value, of(_FLOAT))
    if kind == FLOAT8:
        # Sign, exponent and mantissa as those of a float16 have the value divided by 2 ** 8, subnormals too.
        byte = b.zext(value, of(_I16))
        rest = b.and_(byte, constant(_I16, 0x7F))
        half = b.or_(b.shl(b.and_(byte, constant(_I16, 0x80)), constant(_I16, 8)), b.shl(rest, constant(_I16, 7)))
        half = b.or_(half, b.sext(b.icmp_unsigned("==", rest, constant(_I16, 0x7F)), of(_I16)))  # NaN
        return b.fmul(b.fpext(b.bitcast(half, of(ir.HalfType())), of(_FLOAT)), constant(_FLOAT, 256.0))
    return b.bitcast(b.shl(b.zext(value, of(_I32)), constant(_I32, 16)), of(_FLOAT))


@intrinsic
def widen(_typing: Any, value: Any) -> Any:
    """An element as float32, exactly."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return widened(builder, value, args[0])

    return types.float32(value), generate


@intrinsic
def narrow(_typing: Any, value: Any, like: Any) -> Any:
    """A float32 as an element of the type of `like`, rounded to the nearest, ties to even."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if like == FLOAT32:
            return args[0]
        if like == FLOAT16:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), _I16)
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.add(bits, builder.add(odd, _I32(0x7FFF)))
        # Rounding could carry a NaN's payload into infinity or zero: give it a quiet bit instead.
        quiet = builder.or_(bits, _I32(0x400000))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.lshr(builder.select(is_nan, quiet, rounded), _I32(16)), _I16)

    return like(types.float32, like), generate


@intrinsic
def pointer(_typing: Any, address: Any, element: Any) -> Any:
    """An address as a pointer to elements of the type `element`."""
    target = types.CPointer(element.instance_type)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(target))

    return target(types.int64, element), generate


@intrinsic
def prefetch(_typing: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of ``array[index]``, one-dimensional, without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return _prefetched(context, builder, builder.gep(data, [args[1]]), 3)

    return types.void(array, types.int64), generate


@intrinsic
def prefetch_far(_typing: Any, address: Any) -> Any:
    """Ask for the cache line of an address, which may be any, into the second cache."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _prefetched(context, builder, builder.inttoptr(args[0], _BYTES), 2)

    return types.void(types.int64), generate


def _prefetched(context: Any, builder: Any, address: Any, near: int) -> Any:
    kind = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(address, _BYTES), _I32(0), _I32(near), _I32(1)])
    return context.get_dummy_value()
