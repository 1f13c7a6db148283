# SPDX-License-Identifier: Apache-2.0
"""The integer product of four-bit weights by `vpdpbusd` (AVX512-VNNI, AVX-VNNI), as vector intrinsics.

Four rows' codes are interleaved byte by byte, so that the four bytes of a lane are one column, and multiplied with the
four rows' inputs, signed bytes. The instruction adds the four products to 32 bits. A byte is its lower code plus 16
times its upper one: it is multiplied whole and with the upper half cleared, and the difference of the two sums is 16
times that of the upper codes. Sums have the bits of those of `int4_dot`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spon_plugin.kernels.cpu.int4_dot import NARROW, WIDE, indices, row_addresses
from spon_plugin.kernels.cpu.processor import features

# Rows whose bytes share a lane.
ROWS = 4

_I8, _I16, _I32, _I64, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_SIGNATURE = types.void(*[types.int64] * 7, types.float32)


@intrinsic
def int4_dot_512(
    _typing: Any, rows: Any, inputs: Any, count: Any, column: Any, aheads: Any, ahead: Any, sums: Any, step: Any
) -> Any:
    """`int4_dot.int4_dot_wide` in one register of 512 bits, for ``2 * count`` rows: arguments are the same.

    `rows`, `inputs` and `aheads` go on up to a multiple of `ROWS`, with inputs of 0.
    """
    return _SIGNATURE, _generator(WIDE, 64)


@intrinsic
def int4_dot_256_twice(
    _typing: Any, rows: Any, inputs: Any, count: Any, column: Any, aheads: Any, ahead: Any, sums: Any, step: Any
) -> Any:
    """`int4_dot_512` in registers of 256 bits, one after the other: there are 16 of them, where AVX-512 is missing."""
    return _SIGNATURE, _generator(WIDE, 32)


@intrinsic
def int4_dot_256(
    _typing: Any, rows: Any, inputs: Any, count: Any, column: Any, aheads: Any, ahead: Any, sums: Any, step: Any
) -> Any:
    """`int4_dot_256_twice` for `NARROW` bytes."""
    return _SIGNATURE, _generator(NARROW, 32)


def _generator(width: int, size: int) -> Any:
    """For `width` bytes of a row, `size` in a register."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        b = builder
        rows, inputs, count, column, aheads, ahead, sums, step = args
        rows, aheads = b.inttoptr(rows, _I64.as_pointer()), b.inttoptr(aheads, _I64.as_pointer())
        inputs = b.inttoptr(inputs, _I32.as_pointer())
        longs = ir.VectorType(_I32, size // 4)
        quads = b.sdiv(b.add(count, _I64(1)), _I64(2))
        places = [cgutils.alloca_once(b, longs) for _ in range(8)]
        for first in range(0, width, size):
            for place in places:
                b.store(ir.Constant(longs, [0] * longs.count), place)
            with cgutils.for_range(b, quads) as quad:
                asked = aheads if first == 0 else None  # once for a cache line
                addresses = row_addresses(b, rows, quad.index, ROWS, b.add(column, _I64(first)), asked, ahead)
                values = b.load(b.gep(inputs, [quad.index]))
                _add_quad(b, addresses, values, places, size)
            totals = [b.load(place) for place in places]
            _finish(b, totals, b.add(sums, _I64(4 * 2 * first)), step)
        return context.get_dummy_value()

    return generate


def _add_quad(b: Any, addresses: Any, values: Any, places: Any, size: int) -> None:
    """Add four rows' products: those of lower codes to the first four places, those of whole bytes to the others."""
    octets, longs = ir.VectorType(_I8, size), ir.VectorType(_I32, size // 4)
    rows = []
    for address in addresses:
        rows.append(b.load(b.inttoptr(address, octets.as_pointer())))
        rows[-1].align = 1
    inputs = _repeated(b, values, longs.count)
    mask = ir.Constant(octets, [15] * size)
    pairs = [_woven(b, rows[row], rows[row + 1], second) for second in (False, True) for row in (0, 2)]
    for number in range(4):
        first, other = (b.bitcast(pair, ir.VectorType(_I16, size // 2)) for pair in pairs[number // 2 * 2 :][:2])
        codes = b.bitcast(_woven(b, first, other, number % 2 == 1), octets)
        for place, part in ((places[number], b.and_(codes, mask)), (places[4 + number], codes)):
            b.store(_dot(b, b.load(place), part, inputs), place)


def _finish(b: Any, totals: Any, sums: Any, step: Any) -> None:
    """Add `step` times the products to the sums, in the order in which outputs lie."""
    longs = totals[0].type
    lanes = longs.count // 4  # of 128 bits: of each, vector `n` has outputs 32 * lane + 8 * n and the 7 after it
    floats = ir.VectorType(_FLOAT, longs.count)
    fused = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fmuladd.v{floats.count}f32"
    )
    steps = _repeated(b, step, floats.count)
    four = ir.Constant(longs, [4] * longs.count)
    uppers = [b.ashr(b.sub(totals[4 + n], totals[n]), four) for n in range(4)]

    def eights(n: int, part: int) -> Any:
        """The outputs of vector `n` that are in its `part`-th half of lanes."""
        order = [
            at + 4 * lane + i
            for lane in range(part * lanes // 2, (part + 1) * lanes // 2)
            for i in range(4)
            for at in (0, longs.count)
        ]
        return b.shuffle_vector(totals[n], uppers[n], indices(order))

    for n in range(0, 4, lanes // 2):
        for part in range(2):
            if lanes == 2:
                ready = {32 * part + 8 * n: eights(n, part)}
            else:  # two lanes' eights, and those that follow them
                two, order = (eights(n, part), eights(n + 1, part)), [*range(8), *range(16, 24)]
                ready = {
                    32 * (2 * part + k) + 8 * n: b.shuffle_vector(*two, indices([i + 8 * k for i in order]))
                    for k in range(2)
                }
            for output, whole in ready.items():
                target = b.inttoptr(b.add(sums, _I64(4 * output)), floats.as_pointer())
                held = b.load(target)
                held.align = 4
                b.store(b.call(fused, [b.sitofp(whole, floats), steps, held]), target).align = 4


def _dot(b: Any, total: Any, codes: Any, inputs: Any) -> Any:
    """``total[i] + sum over k of codes[4 i + k] * inputs[4 i + k]``, codes without a sign, by `vpdpbusd` if there."""
    longs, bits = total.type, 32 * total.type.count
    if "avx512vnni" in features() or (bits == 256 and "avxvnni" in features()):
        name = f"llvm.x86.avx512.vpdpbusd.{bits}"
        function = cgutils.get_or_insert_function(b.module, ir.FunctionType(longs, [longs] * 3), name)
        return b.call(function, [total, b.bitcast(codes, longs), inputs])
    signed = b.bitcast(inputs, codes.type)
    for k in range(4):
        order = indices(range(k, codes.type.count, 4))
        code, value = (b.shuffle_vector(part, part, order) for part in (codes, signed))
        total = b.add(total, b.mul(b.zext(code, longs), b.sext(value, longs)))
    return total


def _woven(b: Any, first: Any, other: Any, second: bool) -> Any:
    """Elements of two vectors in turns, within 128 bits, which is one instruction: the first half, or the second."""
    count, lane = first.type.count, 128 // first.type.element.width
    start = lane // 2 if second else 0
    order = [at + start + i for at in range(0, count, lane) for i in range(lane // 2)]
    return b.shuffle_vector(first, other, indices([k for i in order for k in (i, count + i)]))


def _repeated(b: Any, value: Any, count: int) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, value, _I32(0)), undefined, indices([0] * count))
