# SPDX-License-Identifier: Apache-2.0
"""The compiled function that runs the stages of a `program.Program`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from spon_plugin.kernels.cpu.barrier import wait_for_all
from spon_plugin.kernels.cpu.layout import HEAD
from spon_plugin.kernels.cpu.sources import fingerprint
from spon_plugin.kernels.cpu.steps import thread_count, thread_function


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
        head, threads = carray(words, HEAD), thread_count()
        table = carray(words, HEAD + 2 * head[0])
        for stage in range(head[0]):
            _call(table[HEAD + 2 * stage], table[HEAD + 1 + 2 * stage])
            wait_for_all(head[1], threads)

    return thread_function(worker)
