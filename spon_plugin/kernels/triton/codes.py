# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""How the kernels for weights with scales read rows of codes: skipped rows stay unread, the others come as numbers."""

from __future__ import annotations

import triton
import triton.language as tl

from spon_plugin.kernels.triton.common import add_products


@triton.jit
def load_codes(
    codes,
    channels,
    active,
    first,
    end,
    SHARE: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Load ``[C, BLOCK_OUT / SHARE]`` of `codes`; the rows that are not `active` are not read and come as zeros.

    Args:
        codes: points to elements of SHARE columns each.
        channels: int32 ``[C]``.
        active: bool ``[C]``.
        first: the first column, a multiple of SHARE.
        end: where the columns end.
        SHARE: columns of an element: 8 or 4 for int4 or eight bits in int32, 2 or 1 in bytes.
        ROW: elements from one row to the next.
        BLOCK_OUT: columns.
        ALIGN: divides `first` and, where it is more than one, `end`.
    """
    MULTIPLE: tl.constexpr = ALIGN // SHARE if ALIGN > SHARE else 1
    places = tl.multiple_of(first // SHARE, MULTIPLE) + tl.arange(0, BLOCK_OUT // SHARE)
    # Not by columns, so that the compiler sees that the mask changes at multiples only, and loads sixteen bytes.
    inside = places < tl.multiple_of((end + SHARE - 1) // SHARE, MULTIPLE)
    return tl.load(
        (codes + channels.to(tl.int64) * ROW)[:, None] + places[None, :],
        mask=active[:, None] & inside[None, :],
        other=0,
        eviction_policy="evict_first",
    )


@triton.jit
def numbers(loaded, FORMAT: tl.constexpr, MIDDLE: tl.constexpr, DTYPE: tl.constexpr):
    """Loaded codes as ``[C, BLOCK_OUT]`` numbers of DTYPE, which holds every code exactly, less MIDDLE.

    Args:
        loaded: as from `load_codes`.
        FORMAT: "int8", "int4" (the even column in the lower bits) or "fp8 bits", in bytes; with " words" for " bits" or
            at the end, in int32; "fp8", in bytes, for e4m3 that the GPU converts itself.
        MIDDLE: the code that stands for zero.
        DTYPE: float32, or what tensor cores take.
    """
    if FORMAT == "fp8":
        return loaded.to(tl.float8e4nv, bitcast=True).to(tl.float32).to(DTYPE)
    else:
        return _columns(loaded, loaded, None, FORMAT, MIDDLE, DTYPE, 0)


@triton.jit
def lane_sums(loaded, value, into, FORMAT: tl.constexpr, MIDDLE: tl.constexpr, LANES: tl.constexpr):
    """float32 ``[LANES, BLOCK_OUT]``: one row's `value` ``[C]`` times the codes, as `add_products` adds up.

    A column of each loaded element at a time, so that few numbers are alive at once, and registers are left for loads.

    Args:
        loaded: as from `load_codes`.
        value: float32 ``[C]``.
        into: what the products are added to, or None for zeros.
        FORMAT: as in `numbers`.
        MIDDLE: likewise.
        LANES: divides C.
    """
    if FORMAT == "fp8":
        weight = numbers(loaded, FORMAT, MIDDLE, tl.float32)
        sums = tl.zeros([LANES, weight.shape[1]], tl.float32) if into is None else into
        return add_products(sums, value, weight, 1, True)
    else:
        return _columns(loaded, value, into, FORMAT, MIDDLE, tl.float32, LANES)


@triton.jit
def listed_lane_sums(loaded, value, sums, count, FORMAT: tl.constexpr, MIDDLE: tl.constexpr, LANES: tl.constexpr):
    """`sums` plus `lane_sums` of the first `count` channels; of the others, LANES at a time cost nothing.

    `value` is zero beyond `count`.
    """
    turns: tl.constexpr = loaded.shape[0] // LANES
    loaded = tl.permute(tl.reshape(loaded, [turns, LANES, loaded.shape[1]]), (1, 2, 0))
    value = tl.permute(tl.reshape(value, [turns, LANES]), (1, 0))
    return _listed_in_turn(loaded, value, sums, count, 0, 1, FORMAT, MIDDLE, LANES)


@triton.jit
def _listed_in_turn(
    loaded,
    value,
    sums,
    count,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    FORMAT: tl.constexpr,
    MIDDLE: tl.constexpr,
    LANES: tl.constexpr,
):
    """`listed_lane_sums` of the turns FIRST, FIRST + STEP, ...: ``[LANES, W, turns]`` and ``[LANES, turns]``."""
    turns: tl.constexpr = loaded.shape[2]
    if turns == 1:
        if count > FIRST * LANES:
            codes = tl.reshape(loaded, [loaded.shape[0], loaded.shape[1]])
            sums = lane_sums(codes, tl.reshape(value, [value.shape[0]]), sums, FORMAT, MIDDLE, LANES)
        return sums
    else:
        loaded_0, loaded_1 = tl.split(tl.reshape(loaded, [loaded.shape[0], loaded.shape[1], turns // 2, 2]))
        value_0, value_1 = tl.split(tl.reshape(value, [value.shape[0], turns // 2, 2]))
        sums = _listed_in_turn(loaded_0, value_0, sums, count, FIRST, 2 * STEP, FORMAT, MIDDLE, LANES)
        return _listed_in_turn(loaded_1, value_1, sums, count, FIRST + STEP, 2 * STEP, FORMAT, MIDDLE, LANES)


@triton.jit
def _columns(loaded, value, into, FORMAT: tl.constexpr, MIDDLE: tl.constexpr, DTYPE: tl.constexpr, LANES: tl.constexpr):
    """The columns of each element side by side, as `_column` gives them."""
    if FORMAT == "int4 words":
        # Even columns, then odd ones; each four of one parity lie a byte apart.
        even, odd = _halves(into)
        return tl.interleave(
            _bytes(loaded, value, even, 15, 0, MIDDLE, DTYPE, LANES),
            _bytes(loaded, value, odd, 240, 4, MIDDLE, DTYPE, LANES),
        )
    elif FORMAT == "int8 words":
        return _bytes(loaded ^ -0x7F7F7F80, value, into, 255, 0, MIDDLE + 128, DTYPE, LANES)
    elif FORMAT == "fp8 words":
        return _bytes(loaded, value, into, 0, 0, MIDDLE, DTYPE, LANES)
    elif FORMAT == "int4":
        even, odd = _halves(into)
        wide = loaded.to(tl.int32) | 0x4B000000
        return tl.interleave(
            _column(wide, value, even, 15, 0, MIDDLE, DTYPE, LANES),
            _column(wide, value, odd, 240, 4, MIDDLE, DTYPE, LANES),
        )
    elif FORMAT == "int8":
        return _column((loaded.to(tl.int32) ^ 128) | 0x4B000000, value, into, 255, 0, MIDDLE + 128, DTYPE, LANES)
    else:
        return _column(loaded.to(tl.int32), value, into, 0, 0, MIDDLE, DTYPE, LANES)


@triton.jit
def _halves(into):
    """The even and the odd columns of ``[L, C]``; None twice of None."""
    if into is None:
        return None, None
    else:
        return tl.split(tl.reshape(into, [into.shape[0], into.shape[1] // 2, 2]))


@triton.jit
def _bytes(
    words,
    value,
    into,
    MASK: tl.constexpr,
    SHIFT: tl.constexpr,
    MIDDLE: tl.constexpr,
    DTYPE: tl.constexpr,
    LANES: tl.constexpr,
):
    """`_column` for each byte of int32, lowest first."""
    lower = words
    upper = (words.to(tl.uint32, bitcast=True) >> 16).to(tl.int32, bitcast=True)
    if MASK != 0:
        lower = (lower & 0xFFFF) | 0x4B000000
        upper = upper | 0x4B000000
    into_even, into_odd = _halves(into)
    into_0, into_2 = _halves(into_even)
    into_1, into_3 = _halves(into_odd)
    even = tl.interleave(
        _column(lower, value, into_0, MASK, SHIFT, MIDDLE, DTYPE, LANES),
        _column(upper, value, into_2, MASK, SHIFT, MIDDLE, DTYPE, LANES),
    )
    odd = tl.interleave(
        _column(lower, value, into_1, MASK << 8, SHIFT + 8, MIDDLE, DTYPE, LANES),
        _column(upper, value, into_3, MASK << 8, SHIFT + 8, MIDDLE, DTYPE, LANES),
    )
    return tl.interleave(even, odd)


@triton.jit
def _column(
    bits,
    value,
    into,
    MASK: tl.constexpr,
    SHIFT: tl.constexpr,
    MIDDLE: tl.constexpr,
    DTYPE: tl.constexpr,
    LANES: tl.constexpr,
):
    """``((bits & MASK) >> SHIFT) - MIDDLE`` for a MASK below 2^16, or e4m3 at SHIFT if MASK is 0; exactly.

    `bits` then has the exponent of 2^23 above: in the fraction of such a float32 bits count as integers. That takes two
    fast instructions, where a conversion runs at a fraction of their speed. If LANES, not the numbers come back but the
    lanes' sums of `value` times them, added to `into` unless that is None.
    """
    if MASK == 0:
        number = _e4m3(bits, SHIFT)
        unit = 1.0
    else:
        number = (bits & (MASK | 0x4B000000)).to(tl.float32, bitcast=True) - (8388608.0 + (MIDDLE << SHIFT))
        unit = 1.0 / (1 << SHIFT)
    if LANES == 0:
        return (number * unit).to(DTYPE)
    else:
        turns: tl.constexpr = bits.shape[0] // LANES
        number = tl.permute(tl.reshape(number, [turns, LANES, bits.shape[1]]), (1, 2, 0))
        if into is None:
            value = tl.permute(tl.reshape(value, [turns, LANES]), (1, 0))
            return _in_turn(number, value, tl.zeros([LANES, bits.shape[1]], tl.float32)) * unit
        else:  # for few turns, which have fewer inputs than sums
            value = tl.permute(tl.reshape(value * unit, [turns, LANES]), (1, 0))
            return _in_turn(number, value, into)


@triton.jit
def _in_turn(number, value, sums):
    """`sums` ``[L, W]`` plus ``number[:, :, t] * value[:, t]``, one t after the other.

    `tl.sum` would add up in pairs, for which more numbers have to be alive, and registers would spill.
    """
    turns: tl.constexpr = number.shape[2]
    if turns == 1:
        value = tl.reshape(value, [value.shape[0]])[:, None]
        return sums + tl.reshape(number, [number.shape[0], number.shape[1]]) * value
    else:
        number_0, number_1 = tl.split(tl.reshape(number, [number.shape[0], number.shape[1], turns // 2, 2]))
        value_0, value_1 = tl.split(tl.reshape(value, [value.shape[0], turns // 2, 2]))
        return _in_turn(number_1, value_1, _in_turn(number_0, value_0, sums))


@triton.jit
def _e4m3(bits, SHIFT: tl.constexpr):
    """float32 of the e4m3 at bit SHIFT: sign, exponent and fraction in their places; the exponents differ by 120."""
    number = (((bits << (24 - SHIFT)) >> 4) & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36
    # All ones are NaN; as a number they would be 480.
    return tl.where(tl.abs(number) > 464.0, float("nan"), number)
