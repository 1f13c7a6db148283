# SPDX-License-Identifier: Apache-2.0
"""The compiled function that runs the stages of a `program.Program`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from spon_plugin.kernels.cpu.sources import fingerprint
from spon_plugin.kernels.cpu.steps import barrier, thread_function


@intrinsic
def _call(_typing: Any, _function: Any, _words: Any) -> Any:
    """Call the thread function at an address with the fields at another."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        words = ir.IntType(64).as_pointer()
        function = ir.FunctionType(ir.VoidType(), [words]).as_pointer()
        builder.call(builder.inttoptr(args[0], function), [builder.inttoptr(args[1], words)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def compile_runner() -> Any:
    """A thread function that runs others; see `worker.compile_worker`."""
    source = fingerprint()

    def worker(words):  # type: ignore[no-untyped-def]
        source  # noqa: B018 (part of the key in Numba's cache)
        count = carray(words, 1)[0]
        table = carray(words, 1 + 2 * count)
        for stage in range(count):
            _call(table[1 + 2 * stage], table[2 + 2 * stage])
            barrier()

    return thread_function(worker)
