# SPDX-License-Identifier: Apache-2.0
"""The vector code of products on panels of bfloat16: tiles of AMX, or pairs by AVX512-BF16.

Both multiply pairs of inputs, so a panel holds two rows of the weight side by side; and it lies tile by tile, as x does
and as it is loaded.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spon_plugin.kernels.cpu import processor
from spon_plugin.kernels.cpu.numba_types import FLOAT8, INT8
from spon_plugin.kernels.cpu.panel_tile import LANES, read_floats, vector, with_scales
from spon_plugin.kernels.cpu.panels_layout import BF16_COLUMNS as COLUMNS
from spon_plugin.kernels.cpu.panels_layout import BF16_ROWS as ROWS
from spon_plugin.kernels.cpu.panels_layout import BF16_STEP as STEP

_VECTORS = COLUMNS // LANES
_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTES, _VOID = _I8.as_pointer(), ir.VoidType()
_INTS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(ir.FloatType(), LANES)
# Palette 1: eight tiles of 16 rows of 64 bytes.
_CONFIGURATION = bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])
_LINE = 64  # bytes of a tile's row
_TILE = ROWS * _LINE
# Sums are tiles 0 to 3, by rows of x and then by outputs; x is 4 and 5, and the panel 6 and 7.
_X, _PANEL = 4, 6
_REQUEST_PERMISSION, _TILE_DATA = 0x1023, 18  # of arch_prctl(2): ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
_ARCH_PRCTL = 158


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


@cache
def has_tiles() -> bool:
    """Whether this process may use AMX: the processor has it, and Linux lets it keep the registers."""
    if not {"amx-tile", "amx-bf16"} <= processor.features():
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def is_available() -> bool:
    """Whether the processor has AVX512-BF16, with tiles or without."""
    return {"avx512bf16", "avx512bw", "avx512f"} <= processor.features()


@intrinsic
def configure(_typing: Any) -> Any:
    """Set a thread's tiles up; before `tiles_1` and `tiles_2`."""

    def generate(context: Any, b: Any, _signature: Any, _args: Any) -> Any:
        kind = ir.ArrayType(_I8, 64)
        held = cgutils.global_constant(b, "spon_tiles", ir.Constant(kind, bytearray(_CONFIGURATION)))
        _call(b, "ldtilecfg", [b.bitcast(held, _BYTES)])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def release(_typing: Any) -> Any:
    """Give a thread's tiles up, which a switch of threads would otherwise have to save."""

    def generate(context: Any, b: Any, _signature: Any, _args: Any) -> Any:
        _call(b, "tilerelease", [])
        return context.get_dummy_value()

    return types.void(), generate


def _call(b: Any, name: str, args: list[Any]) -> Any:
    kind = ir.FunctionType(_VOID, [each.type for each in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.{name}"), args)


def _tiles_of(blocks: int) -> Any:
    @intrinsic
    def tiles(_typing: Any, x: Any, strip: Any, sums: Any, steps: Any) -> Any:
        """``sums[r, c] += sum over k of x[r, k] * strip[k, c]``, in the order of k, for some tiles of rows.

        Args:
            x: the address of bfloat16 ``[tile of rows, step, ROWS, STEP]``.
            strip: of bfloat16 ``[step, tile of outputs, STEP / 2, outputs of a tile, 2]``.
            sums: of float32 ``[rows, COLUMNS]``.
            steps: how many times `STEP` inputs, at least one.
        """

        def generate(context: Any, b: Any, _signature: Any, args: Any) -> Any:
            x, strip, sums, steps = args
            row, line = _I64(4 * COLUMNS), _I64(_LINE)

            def place(address: Any, offset: Any) -> Any:
                return b.inttoptr(b.add(address, offset), _BYTES)

            held = [
                (2 * r + c, place(sums, _I64(r * ROWS * 4 * COLUMNS + _LINE * c)))
                for r in range(blocks)
                for c in (0, 1)
            ]
            for tile, at in held:
                _call(b, "tileloadd64", [_I8(tile), at, row])
            further = b.mul(steps, _I64(_TILE))
            with cgutils.for_range(b, steps) as step:
                first = b.mul(step.index, _I64(_TILE))
                for r in range(blocks):
                    offset = first if r == 0 else b.add(first, further)
                    _call(b, "tileloadd64", [_I8(_X + r), place(x, offset), line])
                begin = b.mul(step.index, _I64(2 * _TILE))
                for c in (0, 1):
                    offset = b.add(begin, _I64(_TILE * c))
                    _call(b, "tileloadd64", [_I8(_PANEL + c), place(strip, offset), line])
                    for r in range(blocks):
                        _call(b, "tdpbf16ps", [_I8(2 * r + c), _I8(_X + r), _I8(_PANEL + c)])
            for tile, at in held:
                _call(b, "tilestored64", [_I8(tile), at, row])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return tiles


tiles_1, tiles_2 = _tiles_of(1), _tiles_of(2)


@intrinsic
def pairs_8(_typing: Any, x: Any, strip: Any, sums: Any, steps: Any) -> Any:
    """`tiles_1` for eight rows, one half of a tile's, by AVX512-BF16."""
    rows = 8

    def generate(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        x, strip, sums, steps = args
        bfloats = ir.VectorType(_BFloat(), 2 * LANES)
        kind = ir.FunctionType(_FLOATS, [_FLOATS, bfloats, bfloats])
        dot = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        undefined, firsts = ir.Constant(_INTS, ir.Undefined), ir.Constant(_INTS, [0] * LANES)
        count, pairs = rows * _VECTORS, STEP // 2
        held = [vector(b, sums, i) for i in range(count)]
        before, loop, after = b.block, b.append_basic_block("pairs"), b.append_basic_block("done")
        last = b.mul(steps, _I64(pairs))
        b.branch(loop)
        b.position_at_end(loop)
        pair, totals = b.phi(_I64), [b.phi(_FLOATS) for _ in range(count)]
        step, place = b.lshr(pair, _I64(pairs.bit_length() - 1)), b.and_(pair, _I64(pairs - 1))
        weights_at = b.add(strip, b.add(b.mul(step, _I64(_VECTORS * _TILE)), b.mul(place, _I64(_LINE))))
        inputs_at = b.add(x, b.add(b.mul(step, _I64(_TILE)), b.mul(place, _I64(4))))
        weights = [b.bitcast(vector(b, weights_at, v * ROWS, 4, _INTS), bfloats) for v in range(_VECTORS)]
        new = []
        for r in range(rows):
            one = b.load(b.inttoptr(b.add(inputs_at, _I64(_LINE * r)), _I32.as_pointer()))
            value = b.bitcast(b.shuffle_vector(b.insert_element(undefined, one, _I32(0)), undefined, firsts), bfloats)
            new += [b.call(dot, [totals[r * _VECTORS + v], value, weights[v]]) for v in range(_VECTORS)]
        following = b.add(pair, _I64(1))
        for phi, first, later in [(pair, _I64(0), following), *zip(totals, held, new, strict=True)]:
            phi.add_incoming(first, before)
            phi.add_incoming(later, loop)
        b.cbranch(b.icmp_signed("<", following, last), loop, after)
        b.position_at_end(after)
        target = b.inttoptr(sums, _FLOATS.as_pointer())
        for i in range(count):
            b.store(new[i], b.gep(target, [_I64(i)])).align = 4
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _pair_packer_of(element: Any, bits: int, shifted: bool) -> Any:
    @intrinsic
    def pack(_typing: Any, row: Any, other: Any, strips: Any, scale: Any, scale_2: Any, out: Any, step: Any) -> Any:
        """Put the whole strips of two rows of a weight into a panel, side by side and rounded to bfloat16.

        Args:
            row: the address of the first element, in the panel, of the row that belongs to the even input.
            other: of the other row; 0 for zeros.
            strips: how many.
            scale: the address of scales, zero points and offsets of `row`, float32 ``[3, panel_tile.PANEL]``.
            scale_2: of `other`.
            out: the address of the pair in the panel's first strip; its next vector is a tile further.
            step: bytes from one strip to the next.
        """

        def generate(context: Any, b: Any, _signature: Any, args: Any) -> Any:
            row, other, strips, scale, scale_2, out, apart = args
            width = COLUMNS * bits // 8
            other, kept = _second(b, row, other)
            with cgutils.for_range(b, strips) as strip:
                shift = b.mul(strip.index, _I64(width))
                scales_at = b.mul(strip.index, _I64(4 * COLUMNS))
                target = b.inttoptr(b.add(out, b.mul(strip.index, apart)), _INTS.as_pointer())
                rows = [
                    _floats(b, b.add(start, shift), b.add(scales, scales_at))
                    for start, scales in ((row, scale), (other, scale_2))
                ]
                for v, (even, odd) in enumerate(zip(*rows, strict=True)):
                    pair = b.and_(_pairs(b, even, odd), kept)
                    b.store(pair, b.gep(target, [_I64(v * STEP // 2)])).align = 4
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    def _floats(b: Any, source: Any, scales: Any) -> list[Any]:
        if bits == 4 and not shifted:  # an element of a table by the lower four bits of a lane
            table = ir.Constant(_FLOATS, [float(code - 8) for code in range(16)])
            kind = ir.FunctionType(_FLOATS, [_FLOATS, _INTS])
            look_up = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.permvar.sf.512")
            codes = b.zext(vector(b, source, 0, 1, ir.VectorType(_I8, LANES)), _INTS)
            halves = [b.call(look_up, [table, part]) for part in (codes, b.lshr(codes, _constant(4)))]
            orders = [[k // 2 + LANES * (k % 2) + start for k in range(LANES)] for start in (0, LANES // 2)]
            values = [b.shuffle_vector(*halves, ir.Constant(_INTS, order)) for order in orders]
        else:
            values = read_floats(b, source, element, bits, _VECTORS)
        if shifted:
            return [with_scales(b, value, scales, v) for v, value in enumerate(values)]
        return [b.fmul(value, vector(b, scales, v)) for v, value in enumerate(values)]

    return pack


def _constant(number: int) -> Any:
    return ir.Constant(_INTS, [number] * LANES)


def _pairs(b: Any, even: Any, odd: Any) -> Any:
    """Two vectors of float32 rounded to bfloat16, ties to even, and put side by side: lanes of 32 bits."""
    kind = ir.FunctionType(ir.VectorType(_BFloat(), 2 * LANES), [_FLOATS, _FLOATS])
    convert = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.cvtne2ps2bf16.512")
    halves = b.bitcast(b.call(convert, [odd, even]), ir.VectorType(_I16, 2 * LANES))
    order = [k // 2 + LANES * (k % 2) for k in range(2 * LANES)]
    mixed = b.shuffle_vector(halves, halves, ir.Constant(ir.VectorType(_I32, 2 * LANES), order))
    return b.bitcast(mixed, _INTS)


@intrinsic
def pack_bfloat16(_typing: Any, row: Any, other: Any, strips: Any, out: Any, step: Any) -> Any:
    """`pack_int8` for a weight that is bfloat16 itself."""

    def generate(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        row, other, strips, out, apart = args
        other, kept = _second(b, row, other)
        halves = ir.VectorType(_I16, LANES)
        with cgutils.for_range(b, strips) as strip:
            shift = b.mul(strip.index, _I64(2 * COLUMNS))
            target = b.inttoptr(b.add(out, b.mul(strip.index, apart)), _INTS.as_pointer())
            for v in range(_VECTORS):
                even, odd = (b.zext(vector(b, b.add(at, shift), v, 2, halves), _INTS) for at in (row, other))
                pair = b.or_(even, b.and_(b.shl(odd, _constant(16)), kept))
                b.store(pair, b.gep(target, [_I64(v * STEP // 2)])).align = 4
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _second(b: Any, row: Any, other: Any) -> Any:
    """A row to read in place of one that is not there, and the bits of pairs that are kept."""
    none = b.icmp_signed("==", other, _I64(0))
    bits = b.select(none, _I32(0xFFFF), _I32(-1))
    undefined = ir.Constant(_INTS, ir.Undefined)
    return b.select(none, row, other), b.shuffle_vector(
        b.insert_element(undefined, bits, _I32(0)), undefined, _constant(0)
    )


pack_int8, pack_float8, pack_int4 = (
    _pair_packer_of(kind, bits, False) for kind, bits in ((INT8, 8), (FLOAT8, 8), (FLOAT8, 4))
)
pack_int8_shifted, pack_float8_shifted, pack_int4_shifted = (
    _pair_packer_of(kind, bits, True) for kind, bits in ((INT8, 8), (FLOAT8, 8), (FLOAT8, 4))
)
