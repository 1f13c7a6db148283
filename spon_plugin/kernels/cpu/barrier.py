# SPDX-License-Identifier: Apache-2.0
"""Where the threads of a kernel wait for each other: without giving up the core first, and asleep if it takes long.

A token of a small model has some hundred barriers, and between two of them a few microseconds of work. GNU's OpenMP
waits for milliseconds with the core in its hand before it sleeps. Where another process wants the cores, that is the
very core that the missing thread waits for, at every barrier: a token then takes seconds. A thread here turns for
`PATIENCE`, then sleeps until it is woken; and where many waits in a row were that long, the next ones sleep at once.
"""

from __future__ import annotations

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Of `kernel.new_barrier` four int32: threads that have come, how often all have, how many sleep, what long waits count.
_COME, _TIMES, _ASLEEP, _LONG = 0, 4, 8, 12

PATIENCE, IN_A_HURRY = 2e-4, 5e-6  # seconds until a thread sleeps, and where the waits before were long
# A long wait counts as many short ones. Above `MANY` no thread turns for long, as often as `SHUN` says. One long wait
# in ten, as uneven shares of the work bring, never gets there.
COUNTS, MANY, SHUN = 8, 16, 144
_TURNS = 16  # between two looks at the clock

_SLEEP, _WAKE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE of this process alone: linux/futex.h
_NUMBERS = {"x86_64": 202, "aarch64": 98}  # of the system call
_NUMBER = _NUMBERS.get(platform.machine(), 0) if sys.platform == "linux" else 0
_EVERYBODY = 2**31 - 1

_I32 = ir.IntType(32)
_PAUSES = {"x86_64": ("llvm.x86.sse2.pause", []), "aarch64": ("llvm.aarch64.hint", [_I32(1)])}

_of_openmp = types.ExternalFunction("GOMP_barrier", types.void())
_seconds = types.ExternalFunction("omp_get_wtime", types.float64())
_system_call = types.ExternalFunction(
    "syscall", types.int64(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64)
)


def _on_word(operation: Any) -> Any:
    """An intrinsic on the int32 at an address and another int32, in one order for all threads."""

    @intrinsic
    def on_word(_typing: Any, address: Any, value: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return operation(builder, builder.inttoptr(args[0], _I32.as_pointer()), args[1])

        return types.int32(types.int64, types.int32), generate

    return on_word


_add = _on_word(lambda b, place, value: b.atomic_rmw("add", place, value, "seq_cst"))
_put = _on_word(lambda b, place, value: b.atomic_rmw("xchg", place, value, "seq_cst"))
_get = _on_word(lambda b, place, _: b.load_atomic(place, "seq_cst", 4))


@intrinsic
def _pause(_typing: Any) -> Any:
    """Let the other thread of the core, if it has one, go first."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        if platform.machine() in _PAUSES:
            name, given = _PAUSES[platform.machine()]
            kind = ir.FunctionType(ir.VoidType(), [value.type for value in given])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), given)
        return context.get_dummy_value()

    return types.void(), generate


@njit
def wait_for_all(barrier: int, threads: int) -> None:
    """Return once all threads of a team have called this as often; what they wrote before can be read then.

    Args:
        barrier: address of a `kernel.new_barrier`.
        threads: of the team.
    """
    if _NUMBER == 0:  # no way to sleep is known
        _of_openmp()
        return
    times = _get(barrier + _TIMES, 0)
    if _add(barrier + _COME, 1) == threads - 1:
        _put(barrier + _COME, 0)
        _put(barrier + _TIMES, times + 1)
        if _get(barrier + _ASLEEP, 0) > 0:
            _system_call(_NUMBER, barrier + _TIMES, _WAKE, _EVERYBODY, 0, 0, 0)
        return
    long = _get(barrier + _LONG, 0)
    hurries = long > MANY
    patience = IN_A_HURRY if hurries else PATIENCE
    start = _seconds()
    while _seconds() - start < patience:
        for _ in range(_TURNS):
            if _get(barrier + _TIMES, 0) != times:
                if long > 0:
                    _put(barrier + _LONG, long - 1)
                return
            _pause()
    if hurries:
        _put(barrier + _LONG, long - 1)
    else:
        _put(barrier + _LONG, long + COUNTS if long + COUNTS <= MANY else SHUN)
    _add(barrier + _ASLEEP, 1)
    while _get(barrier + _TIMES, 0) == times:
        _system_call(_NUMBER, barrier + _TIMES, _SLEEP, times, 0, 0, 0)
    _add(barrier + _ASLEEP, -1)
