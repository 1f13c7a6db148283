# SPDX-License-Identifier: Apache-2.0
"""Compile launches of the Triton kernels without running them, in many processes: Triton's cache on disk has them then.

A launch takes seconds to compile and microseconds to run, and its compiler works on one core.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from spon_plugin.kernels.triton.configs import DTYPES, SCALED_MODULES, Launch
from spon_plugin.weights.formats import SCALED
from spon_plugin.weights.scaled import ScaledWeight


@contextlib.contextmanager
def compiled_only() -> Iterator[dict[str, Any]]:
    """Where launches compile and do not run; what was compiled, by the kernel's name."""
    function = import_module("triton.runtime.jit").JITFunction
    compiled: dict[str, Any] = {}

    def compile_one(kernel: Any, *arguments: object, warmup: bool, **options: object) -> None:
        compiled[kernel.__name__] = run(kernel, *arguments, warmup=True, **options)

    run, function.run = function.run, compile_one
    try:
        yield compiled
    finally:
        function.run = run


def empty_weight(
    kind: str, shape: tuple[int, int], group: int, device: torch.device | str, zeros: bool = False
) -> Tensor | ScaledWeight:
    """A weight ``[in_features, out_features]`` without values; of a format one with scales in bfloat16.

    Args:
        kind: a dtype, or a format.
        shape: in_features and out_features.
        group: inputs that share a scale; 0 for all.
        device: where it lies.
        zeros: whether it has zero points.
    """
    if kind in DTYPES:
        return torch.empty(shape, dtype=DTYPES[kind], device=device)
    inputs, outputs = shape
    weight = SCALED[kind]
    groups = -(-inputs // group) if group else 1
    codes = torch.empty(inputs, outputs // weight.unit, dtype=weight.code_dtype, device=device)
    scales = torch.empty(groups, outputs, dtype=torch.bfloat16, device=device)
    point = torch.uint8 if kind == "int4" else torch.int8
    points = torch.empty(groups, outputs, dtype=point, device=device) if zeros else None
    return weight(codes, scales, points, group or inputs)


def compile_launch(
    kind: str, shape: tuple[int, int], group: int, rows: int, launch: Launch, device: str = "cuda"
) -> int:
    """Compile all that a launch consists of, in a process of its own or here.

    Args:
        kind: a dtype, or the format of a weight with scales, then with inputs of bfloat16.
        shape: in_features and out_features.
        group: inputs that share a scale; 0 for all.
        rows: of x.
        launch: fitted to the shape.
        device: of the tensors.

    Returns:
        Bytes of shared memory that a program of its main kernel has.
    """
    dtype = DTYPES.get(kind, torch.bfloat16)
    x = torch.empty(rows, shape[0], dtype=dtype, device=device)
    weight = empty_weight(kind, shape, group, device)
    threshold = torch.empty(1, device=device)
    bias = torch.empty(shape[1], dtype=dtype, device=device)
    with compiled_only() as compiled:
        kernel_for(kind, launch)(x, weight, threshold, bias, launch=launch)
    return max(kernel.metadata.shared for kernel in compiled.values())


def kernel_for(kind: str, launch: Launch) -> Any:
    """The function that launches a kernel for matrices or for weights with scales."""
    module = launch.kernel if kind in DTYPES else SCALED_MODULES[launch.kernel]
    return import_module(f"spon_plugin.kernels.triton.{module}").sparse_linear


def _compile_or_say(*arguments: Any) -> int:
    try:
        return compile_launch(*arguments)
    except Exception as error:
        # Triton's own errors do not survive the way to another process.
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


class Compilers:
    """Processes that compile: one a core but one, started fresh, since a GPU survives no fork."""

    def __init__(self, count: int | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        count = count or max(1, len(os.sched_getaffinity(0)) - 1)
        self._pool = ProcessPoolExecutor(count, context)

    def submit(self, *arguments: Any) -> Future[int]:
        """`compile_launch`, at some time; fails with a RuntimeError, or as the process ended (`BrokenExecutor`)."""
        try:
            return self._pool.submit(_compile_or_say, *arguments)
        except BrokenExecutor as error:
            broken: Future[int] = Future()
            broken.set_exception(error)
            return broken

    def close(self) -> None:
        """Let go of what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
