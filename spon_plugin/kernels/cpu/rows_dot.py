# SPDX-License-Identifier: Apache-2.0
"""Sums of rows of a weight times their inputs, in float32, as a vector intrinsic.

What a compiler makes of the same loops asks first, for every few rows, whether nine arrays overlap, passes them to
another function, and cannot ask memory for rows to come line by line while it reads: on rows of a kilobyte that takes
as long as the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spon_plugin.kernels.cpu.numba_types import widened
from spon_plugin.kernels.cpu.processor import features

IN_FLIGHT = 8  # weight rows read at once; fewer leave memory waiting, more gain nothing
COLUMNS = 64  # columns of a step, of one row of x
DISTANCE = 512  # bytes of a row between what is read and what is asked for
TOGETHER = (4, 2, 1)  # rows of x for which a weight is widened once; widening is the cost

_I8, _I32, _I64, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_NAMES = ("weight", "index", "values", "first", "end", "last", "start", "stop", "sums", "at")
# Where lines that are asked for go: the first cache, or the second. On the Xeon that AVX-512 was measured on, the first
# can wait for 16 lines at once, and 8 rows in flight then wait for each other.
_FIRST, _SECOND = 3, 2


@intrinsic
def rows_dot(
    _typing: Any, weight: Any, index: Any, values: Any, first: Any, end: Any, last: Any, start: Any, stop: Any,
    sums: Any, at: Any,
) -> Any:  # fmt: skip
    """``sums[b, at + j] += sum over q of values[b, q] * weight[index[q], start + j]``, q from `first` to `end`.

    Products are added one after the other, in the order of q: a row of a batch has the bits that it has by itself.
    `IN_FLIGHT` rows are read at once, and what comes `DISTANCE` bytes later in them, or in the rows that follow, is
    asked for.

    Args:
        weight: ``[in_features, columns]``, elements of `numba_types`.
        index: int32, the active inputs.
        values: float32 ``[batch, active inputs]``.
        first: place of the first input.
        end: where the inputs end.
        last: where those end that are asked for.
        start: first column.
        stop: where the columns end.
        sums: float32 ``[batch, columns]``.
        at: where the sum of the first column is.
    """
    kind = weight.dtype
    arrays = {"weight": weight, "index": index, "values": values, "sums": sums}

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        given = dict(zip(_NAMES, args, strict=True))
        for name, of in arrays.items():
            given[name] = context.make_array(of)(context, builder, given[name])
        wide = "avx512f" in features()
        element = context.get_value_type(kind)
        _Sum(builder, kind, element, given, lanes=16 if wide else 8, cache=_SECOND if wide else _FIRST).emit()
        return context.get_dummy_value()

    return types.void(weight, index, values, *[types.int64] * 5, sums, types.int64), generate


@dataclass
class _Sum:
    """The instructions of `rows_dot`.

    Attributes:
        b: builds them.
        kind: type of the weight's elements, of `numba_types`.
        element: likewise, of LLVM.
        given: the arguments by name, arrays opened.
        lanes: floats of a vector.
        cache: where lines that are asked for go.
    """

    b: Any
    kind: Any
    element: Any
    given: dict[str, Any]
    lanes: int
    cache: int

    def emit(self) -> None:
        b, given = self.b, self.given
        batch = cgutils.unpack_tuple(b, given["values"].shape)[0]
        groups = b.sdiv(b.sub(given["end"], given["first"]), _I64(IN_FLIGHT))
        with cgutils.for_range(b, groups) as group:
            self._rows(b.add(given["first"], b.mul(group.index, _I64(IN_FLIGHT))), IN_FLIGHT, batch)
        done = b.add(given["first"], b.mul(groups, _I64(IN_FLIGHT)))
        with cgutils.for_range(b, b.sub(given["end"], done)) as row:
            self._rows(b.add(done, row.index), 1, batch)

    def _rows(self, q: Any, count: int, batch: Any) -> None:
        """Add the products of `count` rows, from place `q` on, for all rows of x."""
        b, size = self.b, self.kind.bitwidth // 8
        indices = b.inttoptr(self._address("index", None, _I64(0), 4), _I32.as_pointer())
        rows: list[Any] = []
        following: list[Any] = []
        for k in range(count):
            own, next_one = b.add(q, _I64(k)), b.add(q, _I64(count + k))
            inside = b.icmp_signed("<", next_one, self.given["last"])
            for places, place in ((rows, own), (following, b.select(inside, next_one, own))):
                row = b.zext(b.load(b.gep(indices, [place])), _I64)
                places.append(self._address("weight", row, self.given["start"], size))
        done = _I64(0)
        for together in TOGETHER:
            passes = b.sdiv(b.sub(batch, done), _I64(together))
            with cgutils.for_range(b, passes) as each:
                at = b.add(done, b.mul(each.index, _I64(together)))
                inputs, sums = [], []
                for n in range(together):
                    row = b.add(at, _I64(n))
                    start = b.inttoptr(self._address("values", row, q, 4), _FLOAT.as_pointer())
                    inputs.append([b.load(b.gep(start, [_I64(k)])) for k in range(count)])
                    sums.append(self._address("sums", row, self.given["at"], 4))
                self._columns(rows, following, inputs, sums)
            done = b.add(done, b.mul(passes, _I64(together)))

    def _columns(
        self, rows: Sequence[Any], following: Sequence[Any], inputs: Sequence[Sequence[Any]], sums: Sequence[Any]
    ) -> None:
        """Go over the columns of some rows for some rows of x, in steps of several vectors, of one, and of a column."""
        b, size = self.b, self.kind.bitwidth // 8
        columns = b.sub(self.given["stop"], self.given["start"])
        # Sums of all rows of x stay in registers, of which there are 16 without AVX-512, and 32 with it.
        vectors = max(1, COLUMNS // self.lanes // (len(sums) if self.lanes == 8 else 1))
        done = _I64(0)
        for several, lanes in ((vectors, self.lanes), (1, self.lanes), (1, 1)):
            width = several * lanes
            repeated = [[self._repeated(value, lanes) for value in of_row] for of_row in inputs]
            steps = b.sdiv(b.sub(columns, done), _I64(width))
            with cgutils.for_range(b, steps) as step:
                column = b.add(done, b.mul(step.index, _I64(width)))
                place = b.mul(column, _I64(size))
                if several > 1:
                    self._ask(rows, following, place, b.mul(columns, _I64(size)), -(-width * size // 64))
                self._step(rows, repeated, sums, place, column, several, lanes)
            done = b.add(done, b.mul(steps, _I64(width)))

    def _step(
        self, rows: Sequence[Any], inputs: Any, sums: Sequence[Any], place: Any, column: Any, several: int, lanes: int
    ) -> None:
        """Add the products of `several` vectors of columns."""
        b, size = self.b, self.kind.bitwidth // 8
        floats = ir.VectorType(_FLOAT, lanes) if lanes > 1 else _FLOAT
        elements = ir.VectorType(self.element, lanes) if lanes > 1 else self.element
        name = f"llvm.fmuladd.v{lanes}f32" if lanes > 1 else "llvm.fmuladd.f32"
        fused = cgutils.get_or_insert_function(b.module, ir.FunctionType(floats, [floats] * 3), name)
        targets = [b.inttoptr(b.add(start, b.mul(column, _I64(4))), floats.as_pointer()) for start in sums]
        totals = [[self._load(target, vector, 4) for vector in range(several)] for target in targets]
        for k, row in enumerate(rows):
            start = b.inttoptr(b.add(row, place), elements.as_pointer())
            for vector in range(several):
                value = widened(b, self.kind, self._load(start, vector, size))
                for total, of_row in zip(totals, inputs, strict=True):
                    total[vector] = b.call(fused, [of_row[k], value, total[vector]])
        for target, total in zip(targets, totals, strict=True):
            for vector, value in enumerate(total):
                b.store(value, b.gep(target, [_I64(vector)])).align = 4

    def _ask(self, rows: Sequence[Any], following: Sequence[Any], place: Any, length: Any, lines: int) -> None:
        """Ask for lines that come later, in these rows or, past their end, in those that follow."""
        b = self.b
        kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        prefetch = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        ahead = b.add(place, _I64(DISTANCE))
        ends = b.icmp_signed(">=", ahead, length)
        ahead = b.select(ends, b.sub(ahead, length), ahead)
        for own, next_one in zip(rows, following, strict=True):
            asked = b.add(b.select(ends, next_one, own), ahead)
            for line in range(lines):
                to_come = b.inttoptr(b.add(asked, _I64(64 * line)), _I8.as_pointer())
                b.call(prefetch, [to_come, _I32(0), _I32(self.cache), _I32(1)])

    def _address(self, name: str, row: Any, column: Any, size: int) -> Any:
        """Of an element of an array, `size` bytes long."""
        b, array = self.b, self.given[name]
        data = b.add(b.ptrtoint(array.data, _I64), b.mul(column, _I64(size)))
        return data if row is None else b.add(data, b.mul(row, cgutils.unpack_tuple(b, array.strides)[0]))

    def _load(self, pointer: Any, place: int, align: int) -> Any:
        value = self.b.load(self.b.gep(pointer, [_I64(place)]))
        value.align = align
        return value

    def _repeated(self, value: Any, lanes: int) -> Any:
        if lanes == 1:
            return value
        undefined = ir.Constant(ir.VectorType(_FLOAT, lanes), ir.Undefined)
        one = self.b.insert_element(undefined, value, _I32(0))
        return self.b.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))
