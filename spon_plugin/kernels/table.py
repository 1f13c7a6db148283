# SPDX-License-Identifier: Apache-2.0
"""The kernels, one row each, the fastest first: what each takes, and in words why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from spon_plugin.kernels import decoded, gemm
from spon_plugin.kernels.arguments import begins_within_a_byte
from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.kernels.cpu import known_calls, panels, scaled
from spon_plugin.kernels.few_rows import CPU_ROWS, GPU_ROWS
from spon_plugin.kernels.triton import launch as cuda
from spon_plugin.machine import DTYPES
from spon_plugin.weights.formats import SCALED
from spon_plugin.weights.row_weight import RowWeight
from spon_plugin.weights.scaled import ScaledWeight

ANY = "any"
DENSE = "dense"
DECODED = "decoded"
"""The kernel that skips nothing: it decodes a weight with scales for a GEMM."""


class Problem(NamedTuple):
    """A call of `sparse_linear`, as far as the choice of a kernel depends on it.

    Attributes:
        x: ``[..., in_features]``.
        weight: None stands for a matrix ``[in_features, out_features]`` in `x.dtype`, contiguous.
        shard_sizes: see `reference.sparse_linear`.
    """

    x: Tensor
    weight: RowWeight | None = None
    shard_sizes: Sequence[int] | None = None

    @property
    def format(self) -> str:
        """Of the weight, see `RowWeight`."""
        return DENSE if self.weight is None else self.weight.format


class Kernel(NamedTuple):
    """A row of the table.

    Attributes:
        name: as reports show it.
        device: type of the device, or `ANY`.
        formats: of weights.
        max_rows: the most tokens; None for any number, none included.
        objection: what else speaks against a problem; empty if nothing does.
        run: takes x, the matrix or weight with scales, threshold, bias, `shard_sizes` and, with scales, `exact`.
    """

    name: str
    device: str
    formats: tuple[str, ...]
    max_rows: int | None
    objection: Callable[[Problem], str]
    run: Callable[..., Tensor]

    def why_not(self, problem: Problem) -> str:
        """The reason why this kernel does not take `problem`; empty where it does."""
        x = problem.x
        if self.device not in (x.device.type, ANY):
            return f"for {self.device}, not {x.device.type}"
        if problem.format not in self.formats:
            return f"for {', '.join(self.formats)}, not {problem.format}"
        # Without a division, which an empty row would not survive.
        if self.max_rows is not None and not 0 < x.numel() <= self.max_rows * x.size(-1):
            return f"for 1 to {self.max_rows} rows, not {x.shape[:-1].numel()}"
        return self.objection(problem)


def choose(problem: Problem) -> Kernel:
    """The first kernel that takes `problem`."""
    return next(kernel for kernel in KERNELS if not kernel.why_not(problem))


def described(problem: Problem) -> str:
    """The name of the kernel that takes `problem`, and how it sums where that depends on the processor."""
    kernel, weight = choose(problem), problem.weight
    if kernel.run in MANY_ROWS and not _not_panels(problem):
        return f"{kernel.name} ({panels.NAME})"
    if kernel.run is not known_calls.sparse_linear or not isinstance(weight, ScaledWeight):
        return kernel.name
    how = scaled.sums_of(weight)
    return kernel.name if how == weight.format else f"{kernel.name} ({how})"


def reasons(problem: Problem) -> dict[str, str]:
    """Why those before the chosen kernel do not take `problem`, by name."""
    found: dict[str, str] = {}
    for kernel in KERNELS:
        reason = kernel.why_not(problem)
        if not reason:
            if kernel.run in MANY_ROWS and (objection := _not_panels(problem)):
                found[panels.NAME] = objection
            break
        found[kernel.name] = reason
    return found


def _nothing(_problem: Problem) -> str:
    return ""


def _cpu(problem: Problem) -> str:
    if not cpu.is_available():
        return "Numba or GNU's OpenMP is missing"
    if problem.x.dtype not in DTYPES.values():
        return f"for float32, bfloat16 and float16, not {problem.x.dtype}"
    return ""


def _cpu_scaled(problem: Problem) -> str:
    weight = problem.weight
    assert isinstance(weight, ScaledWeight)
    if problem.x.dtype not in DTYPES.values():
        return f"for float32, bfloat16 and float16, not {problem.x.dtype}"
    return _within_bytes(problem, weight) or scaled.why_not(weight)


def _cuda_scaled(problem: Problem) -> str:
    weight = problem.weight
    assert isinstance(weight, ScaledWeight)
    return _within_bytes(problem, weight) or cuda.why_not(problem.x, weight)


def _not_panels(problem: Problem) -> str:
    """Why what takes any number of rows does not multiply by `cpu.panels`; empty where it does."""
    weight = problem.weight
    if not isinstance(weight, ScaledWeight):
        return panels.why_not(problem.x, None if weight is None else weight.codes)
    return _within_bytes(problem, weight) or panels.why_not(problem.x, weight)


def _within_bytes(problem: Problem, weight: ScaledWeight) -> str:
    if problem.shard_sizes and begins_within_a_byte(problem.shard_sizes, weight.unit):
        return "shards that begin within a byte"
    return ""


_SCALED = tuple(SCALED)
MANY_ROWS = (gemm.sparse_linear, decoded.sparse_linear)
KERNELS = (
    Kernel("cuda", "cuda", (DENSE,), None, _nothing, cuda.sparse_linear),
    Kernel("cuda scaled", "cuda", _SCALED, GPU_ROWS, _cuda_scaled, cuda.sparse_linear_scaled),
    Kernel("cpu", "cpu", (DENSE,), CPU_ROWS, _cpu, known_calls.sparse_linear_matrix),
    Kernel("cpu scaled", "cpu", _SCALED, CPU_ROWS, _cpu_scaled, known_calls.sparse_linear),
    Kernel("gemm", ANY, (DENSE,), None, _nothing, gemm.sparse_linear),
    Kernel(DECODED, ANY, _SCALED, None, _nothing, decoded.sparse_linear),
)
