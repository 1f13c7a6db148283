# SPDX-License-Identifier: Apache-2.0
"""The integer product of four-bit weights for AVX2, as a vector intrinsic that Numba cannot express.

Two rows' codes are interleaved byte by byte and multiplied with the two rows' inputs, signed bytes, by `pmaddubsw`. A
sum of two products is at most 2 * 127 * 15, so those of eight pairs fit into 16 bits before they are widened.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WIDE, NARROW = 64, 32  # bytes of a row in a call of `int4_dot_wide` and of `int4_dot_narrow`

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES, _WORDS, _LONGS = ir.VectorType(_I8, 32), ir.VectorType(_I16, 16), ir.VectorType(_I32, 8)
_FLOATS = ir.VectorType(ir.FloatType(), 8)
# Interleaved within each half of a register, which is one instruction: bytes 0-7 and 16-23, then 8-15 and 24-31.
_FIRST, _SECOND = ([k for half in (0, 16) for i in range(8) for k in (half + i + o, 32 + half + i + o)] for o in (0, 8))
# Likewise by 16 bits: the sums of lower and upper codes side by side, as outputs lie.
_WOVEN = [[k for half in (0, 8) for i in range(4) for k in (half + i + o, 16 + half + i + o)] for o in (0, 4)]


@intrinsic
def int4_dot_wide(
    _typing: Any, rows: Any, inputs: Any, pairs: Any, column: Any, aheads: Any, ahead: Any, sums: Any, step: Any
) -> Any:
    """Add the products of pairs of rows with their inputs, for `WIDE` bytes of the rows.

    Args:
        rows: address of the rows' addresses, int64 ``[2 * pairs]``.
        inputs: address of the inputs of each pair as two signed bytes, int16 ``[pairs]``.
        pairs: at most 8.
        column: the first byte.
        aheads: address of the addresses of as many rows to ask for early.
        ahead: a byte of theirs.
        sums: address of the sums, float32 ``[2 * WIDE]``, which are added to.
        step: float32, what the products are multiplied by first.
    """
    return types.void(*[types.int64] * 7, types.float32), _generator(WIDE // 32)


@intrinsic
def int4_dot_narrow(
    _typing: Any, rows: Any, inputs: Any, pairs: Any, column: Any, aheads: Any, ahead: Any, sums: Any, step: Any
) -> Any:
    """`int4_dot_wide` for `NARROW` bytes."""
    return types.void(*[types.int64] * 7, types.float32), _generator(NARROW // 32)


def _generator(vectors: int) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        b = builder
        rows, inputs, pairs, column, aheads, ahead, sums, step = args
        rows, aheads = b.inttoptr(rows, _I64.as_pointer()), b.inttoptr(aheads, _I64.as_pointer())
        inputs = b.inttoptr(inputs, _I16.as_pointer())
        words = [cgutils.alloca_once(b, _WORDS) for _ in range(4 * vectors)]
        for place in words:
            b.store(ir.Constant(_WORDS, [0] * 16), place)
        with cgutils.for_range(b, pairs) as pair:
            _add_pair(b, rows, inputs, pair.index, column, aheads, ahead, words)
        fused = cgutils.get_or_insert_function(b.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fmuladd.v8f32")
        undefined = ir.Constant(_FLOATS, ir.Undefined)
        steps = b.shuffle_vector(b.insert_element(undefined, step, _I32(0)), undefined, indices([0] * 8))
        for vector in range(vectors):
            for second in range(2):
                low, high = b.load(words[4 * vector + second]), b.load(words[4 * vector + 2 + second])
                for upper, order in enumerate(_WOVEN):
                    woven = b.shuffle_vector(low, high, indices(order))
                    for half in range(2):
                        output = 64 * vector + 32 * half + 16 * second + 8 * upper
                        target = b.inttoptr(b.add(sums, _I64(4 * output)), _FLOATS.as_pointer())
                        part = b.shuffle_vector(woven, woven, indices(range(8 * half, 8 * half + 8)))
                        held = b.load(target)
                        held.align = 4
                        whole = b.sitofp(b.sext(part, _LONGS), _FLOATS)
                        b.store(b.call(fused, [whole, steps, held]), target).align = 4
        return context.get_dummy_value()

    return generate


def _add_pair(b: Any, rows: Any, inputs: Any, pair: Any, column: Any, aheads: Any, ahead: Any, words: Any) -> None:
    madd = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(_WORDS, [_BYTES, _BYTES]), "llvm.x86.avx2.pmadd.ub.sw"
    )
    addresses = row_addresses(b, rows, pair, 2, column, aheads, ahead)
    undefined = ir.Constant(_WORDS, ir.Undefined)
    one = b.insert_element(undefined, b.load(b.gep(inputs, [pair])), _I32(0))
    values = b.bitcast(b.shuffle_vector(one, undefined, indices([0] * 16)), _BYTES)
    mask, four = ir.Constant(_BYTES, [15] * 32), ir.Constant(_WORDS, [4] * 16)
    for vector in range(len(words) // 4):
        rows_of_codes = []
        for address in addresses:
            codes = b.load(b.inttoptr(b.add(address, _I64(32 * vector)), _BYTES.as_pointer()))
            codes.align = 1
            rows_of_codes.append(codes)
        for half, order in enumerate((_FIRST, _SECOND)):
            mixed = b.shuffle_vector(*rows_of_codes, indices(order))
            low = b.and_(mixed, mask)
            high = b.and_(b.bitcast(b.lshr(b.bitcast(mixed, _WORDS), four), _BYTES), mask)
            for place, codes in ((words[4 * vector + half], low), (words[4 * vector + 2 + half], high)):
                b.store(b.add(b.load(place), b.call(madd, [codes, values])), place)


def row_addresses(b: Any, rows: Any, block: Any, size: int, column: Any, aheads: Any, ahead: Any) -> list[Any]:
    """Addresses of a byte of the `size` rows of a block; byte `ahead` of as many of `aheads`, if any, is asked for."""
    prefetch = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32]), "llvm.prefetch.p0"
    )
    addresses = []
    for row in range(size):
        number = b.add(b.mul(block, _I64(size)), _I64(row))
        addresses.append(b.add(b.load(b.gep(rows, [number])), column))
        if aheads is not None:
            to_come = b.add(b.load(b.gep(aheads, [number])), ahead)
            b.call(prefetch, [b.inttoptr(to_come, _I8.as_pointer()), _I32(0), _I32(3), _I32(1)])
    return addresses


def indices(order: Any) -> Any:
    """The places that a shuffle takes elements from."""
    order = list(order)
    return ir.Constant(ir.VectorType(_I32, len(order)), order)
