# SPDX-License-Identifier: Apache-2.0
"""Sums of eight rows of a weight times their inputs, in float32, as a vector intrinsic.

What a compiler makes of the same loops asks first, at every call, whether nine arrays overlap, and cannot ask memory
for rows to come line by line while it reads: on rows of a kilobyte that takes as long as the sums.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spon_plugin.kernels.cpu.numba_types import widened

ROWS, COLUMNS, LANES = 8, 64, 8  # rows of a call, columns of a step, floats of a vector
DISTANCE = 512  # bytes of a row between what is read and what is asked for

_I8, _I32, _I64, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, LANES)


@intrinsic
def rows_dot(
    _typing: Any, weight: Any, index: Any, values: Any, q: Any, last: Any, start: Any, stop: Any, sums: Any, b: Any,
    at: Any,
) -> Any:  # fmt: skip
    """``sums[b, at + j] += sum over k of values[b, q + k] * weight[index[q + k], start + j]``, `ROWS` rows.

    While it reads, it asks for what comes `DISTANCE` bytes later in these rows, or in the following `ROWS` of `index`.

    Args:
        weight: ``[in_features, columns]``, elements of `numba_types`.
        index: int32, the active inputs.
        values: float32 ``[batch, active inputs]``.
        q: place of the first input.
        last: where the inputs end.
        start: first column.
        stop: where the columns end.
        sums: float32 ``[batch, columns]``.
        b: row of `values` and `sums`.
        at: where the sum of the first column is.

    Returns:
        How many columns are done: a multiple of `COLUMNS`.
    """
    kind = weight.dtype
    size = kind.bitwidth // 8
    arrays = {"weight": weight, "index": index, "values": values, "sums": sums}

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        given = dict(
            zip(("weight", "index", "values", "q", "last", "start", "stop", "sums", "b", "at"), args, strict=True)
        )
        made = {name: context.make_array(of)(context, builder, given[name]) for name, of in arrays.items()}
        return _sum(builder, context.get_value_type(kind), kind, size, given, made)

    return types.int64(weight, index, values, *[types.int64] * 4, sums, types.int64, types.int64), generate


def _sum(b: Any, element: Any, kind: Any, size: int, given: Any, arrays: Any) -> Any:
    def address(name: str, row: Any, column: Any, bytes_each: int) -> Any:
        """Of an element of an array."""
        strides = cgutils.unpack_tuple(b, arrays[name].strides)
        data = b.add(b.ptrtoint(arrays[name].data, _I64), b.mul(column, _I64(bytes_each)))
        return data if row is None else b.add(data, b.mul(row, strides[0]))

    q, last, start = given["q"], given["last"], given["start"]
    indices = b.inttoptr(address("index", None, _I64(0), 4), _I32.as_pointer())
    inputs_at = b.inttoptr(address("values", given["b"], q, 4), _FLOAT.as_pointer())
    sums = address("sums", given["b"], given["at"], 4)
    undefined, firsts = ir.Constant(_FLOATS, ir.Undefined), ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    starts: list[Any] = []
    following: list[Any] = []
    inputs = []
    for k in range(ROWS):
        own, next_one = b.add(q, _I64(k)), b.add(q, _I64(ROWS + k))
        inside = b.icmp_signed("<", next_one, last)
        for places, place in ((starts, own), (following, b.select(inside, next_one, own))):
            row = b.zext(b.load(b.gep(indices, [place])), _I64)
            places.append(address("weight", row, start, size))
        one = b.insert_element(undefined, b.load(b.gep(inputs_at, [_I64(k)])), _I32(0))
        inputs.append(b.shuffle_vector(one, undefined, firsts))
    prefetch = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32]), "llvm.prefetch.p0"
    )
    fused = cgutils.get_or_insert_function(b.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fmuladd.v8f32")
    elements = ir.VectorType(element, LANES)
    columns = b.sub(given["stop"], start)
    steps, length = b.sdiv(columns, _I64(COLUMNS)), b.mul(columns, _I64(size))
    with cgutils.for_range(b, steps) as step:
        place = b.mul(step.index, _I64(COLUMNS * size))
        ahead = b.add(place, _I64(DISTANCE))
        ends = b.icmp_signed(">=", ahead, length)
        ahead = b.select(ends, b.sub(ahead, length), ahead)
        target = b.inttoptr(b.add(sums, b.mul(step.index, _I64(4 * COLUMNS))), _FLOATS.as_pointer())
        totals = []
        for vector in range(COLUMNS // LANES):
            totals.append(b.load(b.gep(target, [_I64(vector)])))
            totals[-1].align = 4
        for k in range(ROWS):
            asked = b.add(b.select(ends, following[k], starts[k]), ahead)
            for line in range(size):
                to_come = b.inttoptr(b.add(asked, _I64(64 * line)), _I8.as_pointer())
                b.call(prefetch, [to_come, _I32(0), _I32(3), _I32(1)])
            row = b.inttoptr(b.add(starts[k], place), elements.as_pointer())
            for vector in range(COLUMNS // LANES):
                read = b.load(b.gep(row, [_I64(vector)]))
                read.align = size
                totals[vector] = b.call(fused, [inputs[k], widened(b, kind, read), totals[vector]])
        for vector, total in enumerate(totals):
            b.store(total, b.gep(target, [_I64(vector)])).align = 4
    return b.mul(steps, _I64(COLUMNS))
