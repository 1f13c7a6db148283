# SPDX-License-Identifier: Apache-2.0
"""Which launches `benchmarks.tune_sparse_linear` tries: a reasoned list first, then the neighbours of the best.

Splits are left to the device (`Launch.fitted`): a launch then fills other devices, and other shapes, too; `resident`
says both how many programs there are and how many registers each has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from spon_plugin.kernels.triton.configs import DTYPES, Launch, kernels

# Columns in sixteen bytes of weights.
COLUMNS = {**{name: 16 // dtype.itemsize for name, dtype in DTYPES.items()}, "int8": 16, "fp8": 16, "int4": 32}
# Loads of a thread that have to be under way at once where nothing is copied ahead.
LOADS = 8
AXES: dict[str, tuple[int, ...]] = {
    "resident": (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16),
    "num_stages": (1, 3, 4, 5),
    "block_in": (16, 32, 64, 128, 256),
    "block_out": (64, 128, 256, 512, 1024),
    "num_warps": (1, 2, 4, 8),
}
# Below, a thread's registers spill.
LEAST_REGISTERS = 40
# One row: bytes of a row that a program reads, its warps, loads of a thread, and stages.
TILES = (
    (256, 4, 8, 1),
    (256, 4, 8, 3),
    (256, 4, 4, 4),
    (512, 4, 8, 1),
    (512, 4, 8, 3),
    (512, 4, 4, 4),
    (128, 4, 8, 3),
    (128, 4, 4, 4),
    (256, 8, 4, 3),
    (256, 2, 8, 3),
)
# Programs of four warps with eight loads a thread, as their registers allow: without and with stages.
RESIDENT = {"int4": (2, 3), "int8": (4, 5), "fp8": (3, 5)}
MATRIX_RESIDENT = (6, 5)
# Of the compaction kernel for weights with scales, which decodes less at once and so leaves registers for more.
LISTED_RESIDENT = {"int4": 4, "int8": 5, "fp8": 5}
# Several rows, through the tensor cores: block_in, block_out, num_warps, num_stages, resident.
ROW_TILES = ((32, 128, 4, 4, 4), (32, 128, 4, 4, 2), (64, 64, 4, 4, 4), (64, 128, 4, 3, 2), (32, 256, 8, 4, 2))


def reasoned(kind: str, rows: int, present: Launch, group: int = 0) -> list[Launch]:
    """Where to begin: the present launch, and tiles that have enough bytes under way.

    Args:
        kind: a dtype, or the format of a weight with scales.
        rows: of x.
        present: what would be launched as it is; first in the list.
        group: inputs that share a scale; 0 for all.
    """
    found = [replace(present, splits=None)]
    if rows > 1:
        found += [
            Launch("dense_mask", block_in, block_out, None, warps, stages, resident)
            for block_in, block_out, warps, stages, resident in ROW_TILES
        ]
    else:
        for row_bytes, warps, loads, stages in TILES:
            four = RESIDENT.get(kind, MATRIX_RESIDENT)[stages > 1] + (loads < LOADS)
            block_out = row_bytes * COLUMNS[kind] // 16
            block_in = loads * warps * 32 * 16 // row_bytes
            found.append(Launch("dense_mask", block_in, block_out, None, warps, stages, max(1, four * 4 // warps)))
    if "compaction" in kernels(kind, rows):
        listed = [replace(launch, kernel="compaction") for launch in found[1:4]]
        more = LISTED_RESIDENT.get(kind)
        found += listed + [replace(one, resident=more) for one in listed if more and one.num_stages == 1]
    return [launch for launch in dict.fromkeys(found) if allowed(kind, rows, launch, group)]


def neighbours(kind: str, rows: int, launch: Launch, group: int = 0) -> Iterator[Launch]:
    """Launches that are a step along one of `AXES` away, or the other kernel."""
    for axis, values in AXES.items():
        value = getattr(launch, axis)
        below = [one for one in values if one < value][-1:]
        above = [one for one in values if one > value][:1]
        for one in (*below, *above):
            yield from (near for near in [replace(launch, **{axis: one})] if allowed(kind, rows, near, group))
    yield from (replace(launch, kernel=kernel) for kernel in kernels(kind, rows) if kernel != launch.kernel)


def allowed(kind: str, rows: int, launch: Launch, group: int = 0) -> bool:
    """Whether a launch leaves a thread registers, has enough under way, and a block of inputs in one group."""
    threads = 32 * launch.num_warps
    loads = launch.block_in * launch.block_out // (COLUMNS[kind] * threads)
    enough = loads >= LOADS or (launch.num_stages > 2 and loads >= 1)
    return (
        launch.maxnreg >= LEAST_REGISTERS
        and launch.resident * launch.num_warps <= 64
        and (enough if rows == 1 else launch.num_stages > 2)
        and not (group and group % launch.block_in)
    )
