# SPDX-License-Identifier: Apache-2.0
"""The vector code of products on panels: a tile of sums held in registers, and rows of a weight put in panels.

What a compiler makes of the same loops keeps the sums in memory, where they are read and written for every input.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spon_plugin.kernels.cpu.numba_types import BFLOAT16, FLOAT8, FLOAT16, FLOAT32, INT8, widened
from spon_plugin.kernels.cpu.panels_layout import PANEL
from spon_plugin.kernels.cpu.processor import features

# 4 to 6 rows of x and two vectors of outputs make 8 to 12 sums: as many as two units of a latency of four cycles need,
# and as fit, with what they are made of, into 16 registers. AVX-512 has twice as many, of twice the length.
ROWS = (4, 5, 6)
LANES, VECTORS = (16, 4) if "avx512f" in features() else (8, 2)
COLUMNS = LANES * VECTORS
"""Outputs of a tile, and of a strip of a panel."""

_I8, _I32, _I64, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, LANES)


def _fused(b: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return cgutils.get_or_insert_function(b.module, kind, f"llvm.fmuladd.v{LANES}f32")


def vector(b: Any, address: Any, number: int, align: int = 4, kind: Any = _FLOATS) -> Any:
    """Vector `number` of those at an address, loaded."""
    loaded = b.load(b.gep(b.inttoptr(address, kind.as_pointer()), [_I64(number)]))
    loaded.align = align
    return loaded


def _tile_of(rows: int) -> Any:
    @intrinsic
    def tile(_typing: Any, x: Any, strip: Any, sums: Any, depth: Any) -> Any:
        """``sums[r, c] += sum over k of x[k, r] * strip[k, c]``, in the order of k.

        Args:
            x: the address of float32 ``[depth, rows]``.
            strip: of float32 ``[depth, COLUMNS]``.
            sums: of float32 ``[rows, COLUMNS]``.
            depth: inputs, at least one.
        """

        def generate(context: Any, b: Any, _signature: Any, args: Any) -> Any:
            x, strip, sums, depth = args
            undefined = ir.Constant(_FLOATS, ir.Undefined)
            firsts = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
            fused, count = _fused(b), rows * VECTORS
            held = [vector(b, sums, i) for i in range(count)]
            before, loop, after = b.block, b.append_basic_block("inputs"), b.append_basic_block("done")
            b.branch(loop)
            b.position_at_end(loop)
            step, x_at, strip_at = b.phi(_I64), b.phi(_I64), b.phi(_I64)
            totals = [b.phi(_FLOATS) for _ in range(count)]
            weights = [vector(b, strip_at, v) for v in range(VECTORS)]
            inputs = b.inttoptr(x_at, _FLOAT.as_pointer())
            new = []
            for r in range(rows):
                one = b.insert_element(undefined, b.load(b.gep(inputs, [_I64(r)])), _I32(0))
                value = b.shuffle_vector(one, undefined, firsts)
                new += [b.call(fused, [value, weights[v], totals[r * VECTORS + v]]) for v in range(VECTORS)]
            following = b.add(step, _I64(1))
            pairs = [
                (step, _I64(0), following),
                (x_at, x, b.add(x_at, _I64(4 * rows))),
                (strip_at, strip, b.add(strip_at, _I64(4 * COLUMNS))),
                *zip(totals, held, new, strict=True),
            ]
            for phi, first, later in pairs:
                phi.add_incoming(first, before)
                phi.add_incoming(later, loop)
            b.cbranch(b.icmp_signed("<", following, depth), loop, after)
            b.position_at_end(after)
            target = b.inttoptr(sums, _FLOATS.as_pointer())
            for i in range(count):
                b.store(new[i], b.gep(target, [_I64(i)])).align = 4
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return tile


tile_4, tile_5, tile_6 = (_tile_of(rows) for rows in ROWS)


def read_floats(b: Any, source: Any, element: Any, bits: int, vectors: int) -> list[Any]:
    """Codes from an address on as vectors of float32, as they are."""
    if bits == 4:
        read: list[Any] = []
        half, wide = ir.VectorType(_I8, LANES), ir.VectorType(_I32, LANES)
        mask, four = ir.Constant(wide, [15] * LANES), ir.Constant(wide, [4] * LANES)
        first = [k // 2 + LANES * (k % 2) for k in range(LANES)]
        for v in range(vectors // 2):
            codes = b.zext(vector(b, source, v, 1, half), wide)
            even, odd = (b.sitofp(part, _FLOATS) for part in (b.and_(codes, mask), b.lshr(codes, four)))
            for start in (0, LANES // 2):
                order = ir.Constant(wide, [place + start for place in first])
                read.append(b.shuffle_vector(even, odd, order))
        return read
    kind = ir.VectorType(_FLOAT if element == FLOAT32 else ir.IntType(bits), LANES)
    return [widened(b, element, vector(b, source, v, bits // 8, kind)) for v in range(vectors)]


def with_scales(b: Any, value: Any, scales: Any, number: int) -> Any:
    """Codes less their zero points, times scales, and offsets added: those of vector `number` of ``[3, PANEL]``."""
    parts = [vector(b, b.add(scales, b.mul(_I64(k), _I64(4 * PANEL))), number) for k in range(3)]
    return b.call(_fused(b), [b.fsub(value, parts[1]), parts[0], parts[2]])


def _packer_of(element: Any, bits: int, scaled: bool) -> Any:
    @intrinsic
    def pack(_typing: Any, row: Any, strips: Any, scale: Any, out: Any, step: Any) -> Any:
        """Put the whole strips of a row of a weight into a panel, as float32.

        Args:
            row: the address of the row's first element in the panel.
            strips: how many.
            scale: the address of scales, zero points and offsets, float32 ``[3, PANEL]``.
            out: the address of the row in the panel's first strip.
            step: bytes from one strip to the next.
        """

        def generate(context: Any, b: Any, _signature: Any, args: Any) -> Any:
            row, strips, scale, out, apart = args
            width = COLUMNS * bits // 8
            with cgutils.for_range(b, strips) as strip:
                source = b.add(row, b.mul(strip.index, _I64(width)))
                scales = b.add(scale, b.mul(strip.index, _I64(4 * COLUMNS)))
                target = b.inttoptr(b.add(out, b.mul(strip.index, apart)), _FLOATS.as_pointer())
                for v, value in enumerate(read_floats(b, source, element, bits, VECTORS)):
                    if scaled:
                        value = with_scales(b, value, scales, v)
                    b.store(value, b.gep(target, [_I64(v)])).align = 4
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return pack


pack_float32, pack_bfloat16, pack_float16 = (
    _packer_of(kind, bits, False) for kind, bits in ((FLOAT32, 32), (BFLOAT16, 16), (FLOAT16, 16))
)
pack_int8, pack_float8, pack_int4 = (
    _packer_of(kind, bits, True) for kind, bits in ((INT8, 8), (FLOAT8, 8), (FLOAT8, 4))
)
