# SPDX-License-Identifier: Apache-2.0
"""Which GPU kernel runs a shape, and how it is launched: data in `configs/`, one JSON file per device.

Nothing is tuned at import, at the first call or in a CUDA graph's capture. ``python -m benchmarks.tune_sparse_linear``
measures a device and writes its file.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from spon_plugin import machine
from spon_plugin.errors import SponError
from spon_plugin.kernels.few_rows import GPU_ROWS
from spon_plugin.weights.formats import SCALED

FORMAT_VERSION = 2
DIRECTORY = Path(__file__).parents[1] / "configs"
DEFAULT = "default"
KERNELS = ("dense_mask", "compaction")
# The modules of those for weights with scales.
SCALED_MODULES = {"dense_mask": "scaled", "compaction": "scaled_compaction"}
MAX_SPLITS = 256
# 32-bit registers of a multiprocessor, and what they are given out by, on every GPU since compute capability 7.0.
REGISTERS = 65536
REGISTER_STEP = 8
MOST_REGISTERS = 248
# What a grid of more than one wave fills at least: four splits of any grid do.
FILL = 0.8
DTYPES = machine.DTYPES
# Of weights with scales, by the name of their format (`weights.RowWeight`); the dtype of x does not matter to them.
FORMATS = tuple(SCALED)


@dataclass(frozen=True)
class Launch:
    """How a sparse kernel is launched.

    Attributes:
        kernel: "dense_mask" or "compaction".
        block_in: channels that a program loads at once, a power of two of at least 16 (the tensor cores' depth).
        block_out: columns of a program, a power of two of at least 16.
        splits: programs that share the channels of one block of columns; more than one adds a launch that sums up. None
            for as many as fill the device at hand (`fitted`).
        num_warps: warps of a program, a power of two.
        num_stages: depth of the software pipeline.
        resident: programs that a multiprocessor holds at once, by which their registers are limited (`maxnreg`).
    """

    kernel: str
    block_in: int
    block_out: int
    splits: int | None
    num_warps: int
    num_stages: int
    resident: int

    @property
    def maxnreg(self) -> int:
        """Registers that a thread may have so that `resident` programs fit a multiprocessor.

        Said to the compiler, because it otherwise aims at more programs than that: it then puts each load of weights
        next to its use, and two are in flight where eight could be.
        """
        share = REGISTERS // (self.resident * self.num_warps * 32)
        return min(share // REGISTER_STEP * REGISTER_STEP, MOST_REGISTERS)

    def grid(self, sizes: Sequence[int]) -> int:
        """Blocks of columns of shards of these widths: each starts a new one."""
        return sum(-(-size // self.block_out) for size in sizes)

    def fitted(self, in_features: int, sizes: Sequence[int], multiprocessors: int) -> Launch:
        """The same without blocks wider than the columns or splits that no channel is left for, and with a number.

        Args:
            in_features: channels.
            sizes: widths of the shards, which add up to the columns.
            multiprocessors: what the device has.
        """
        launch = replace(self, block_out=min(self.block_out, max(16, next_power_of_two(max(sizes)))))
        blocks_in = max(1, -(-in_features // self.block_in))
        splits = self.splits or filling(launch.grid(sizes), blocks_in, self.resident * multiprocessors)
        return replace(launch, splits=min(splits, blocks_in))


def filling(blocks_out: int, blocks_in: int, slots: int) -> int:
    """Splits with which a grid fills a device once; or, if it is wider than that, without a last wave that idles.

    Programs that are there at the same time share the memory's bandwidth evenly, whatever their number; what costs is a
    few programs that start when all others are done.

    Args:
        blocks_out: blocks of columns.
        blocks_in: blocks of channels.
        slots: programs that the device holds at once.
    """
    if blocks_out <= slots:
        most = min(slots // blocks_out, blocks_in, MAX_SPLITS)
        # As few as leave the longest program as it is: they write fewer sums.
        return -(-blocks_in // -(-blocks_in // most))
    fills = {splits: fill(blocks_out * splits, slots) for splits in range(1, min(4, blocks_in) + 1)}
    return next((splits for splits, filled in fills.items() if filled >= FILL), max(fills, key=fills.__getitem__))


def fill(programs: int, slots: int) -> float:
    """The share of a device's slots that a grid uses, over all its waves."""
    return programs / (-(-programs // slots) * slots)


@dataclass(frozen=True)
class Shape:
    """What to do with a linear layer of one shape.

    Attributes:
        source: which of `Device.sources` the values come from.
        dtypes: the dtypes of weights, or the formats of weights with scales, that this was chosen for.
        in_features: channels.
        out_features: columns.
        crossover: the largest number of rows at which a sparse kernel beats the masked dense GEMM; 0 for none.
        launches: by the largest number of rows that a launch serves, ascending; reaches `crossover`.
    """

    source: str
    dtypes: tuple[str, ...]
    in_features: int
    out_features: int
    crossover: int
    launches: Mapping[int, Launch]


@dataclass(frozen=True)
class Device:
    """A file of `configs/`.

    Attributes:
        sources: by a label, where values come from: a measurement (device, versions, sparsity), or reasoning.
        shapes: the shapes chosen for; others take the nearest.
    """

    sources: Mapping[str, str]
    shapes: tuple[Shape, ...]


def kernels(kind: str, rows: int) -> tuple[str, ...]:
    """Which of `KERNELS` there are for a dtype, or the format of a weight with scales, and so many rows."""
    return KERNELS if kind in DTYPES or rows == 1 else KERNELS[:1]


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value` (at least 1)."""
    return 1 << max(0, value - 1).bit_length()


@lru_cache(maxsize=4096)
def choose(device: str, dtype: torch.dtype | str, in_features: int, out_features: int, rows: int) -> Launch | None:
    """How to run a shape on a device.

    Args:
        device: the device's name, as `torch.cuda.get_device_name` gives it.
        dtype: float32, bfloat16 or float16, or the format of a weight with scales.
        in_features: channels of the layer.
        out_features: its columns.
        rows: number of rows of `x`.

    Returns:
        The launch, or None where the masked dense GEMM is faster: above the crossover of the nearest shape.

    Raises:
        SponError: the device's file is damaged.
    """
    shape = nearest(shapes_of(device, dtype), in_features, out_features)
    if rows > shape.crossover:
        return None
    return next(launch for most, launch in shape.launches.items() if rows <= most)


def shapes_of(device: str, dtype: torch.dtype | str) -> list[Shape]:
    """The shapes known for a device and dtype; the default file's where the device's own has none of that dtype."""
    for path in (file_of(device), DIRECTORY / f"{DEFAULT}.json"):
        shapes = [shape for shape in read(path).shapes if dtype in {DTYPES.get(name, name) for name in shape.dtypes}]
        if shapes:
            return shapes
    raise SponError.of("dtype", dtype, f"one of {', '.join((*DTYPES, *FORMATS))}")


def nearest(shapes: list[Shape], in_features: int, out_features: int) -> Shape:
    """The shape whose two dimensions differ by the smallest factor in all; the first of equals."""

    def distance(shape: Shape) -> float:
        return abs(math.log(shape.in_features / in_features)) + abs(math.log(shape.out_features / out_features))

    return min(shapes, key=distance)


@lru_cache(maxsize=64)
def file_of(device: str, directory: Path = DIRECTORY) -> Path:
    """The file for a device name: the one whose name's words all occur in it, the most words first; or the default.

    ``nvidia_h100.json`` serves "NVIDIA H100 80GB HBM3" unless there is an ``nvidia_h100_80gb_hbm3.json``.
    """
    words = set(words_of(device))
    named = [path for path in sorted(directory.glob("*.json")) if words.issuperset(path.stem.split("_"))]
    return max(named, key=lambda path: path.stem.count("_"), default=directory / f"{DEFAULT}.json")


def words_of(device: str) -> list[str]:
    """The words of a device name: "NVIDIA A100-SXM4-80GB" has nvidia, a100, sxm4 and 80gb."""
    return re.findall(r"[a-z0-9]+", device.lower())


@lru_cache(maxsize=64)
def read(path: Path) -> Device:
    """Read a file of `configs/`, strictly.

    Raises:
        SponError: naming the key that is unknown, missing or of a wrong value.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SponError.of(str(path), str(error), "a readable JSON file") from error
    return parse(data, path.name)


def parse(data: Any, name: str) -> Device:
    """Check a parsed file; `name` is what errors call it.

    Raises:
        SponError: see `read`.
    """
    _keys(data, {"format_version", "sources", "shapes"}, name)
    if data["format_version"] != FORMAT_VERSION:
        raise SponError.of(f"{name}: format_version", data["format_version"], str(FORMAT_VERSION))
    sources = data["sources"]
    if not isinstance(sources, dict) or not all(isinstance(text, str) and text for text in sources.values()):
        raise SponError.of(f"{name}: sources", sources, "an object that says, by label, where values come from")
    if not isinstance(data["shapes"], list) or not data["shapes"]:
        raise SponError.of(f"{name}: shapes", data["shapes"], "a list of at least one shape")
    shapes = [_shape(shape, f"{name}: shapes[{i}]") for i, shape in enumerate(data["shapes"])]
    for i, shape in enumerate(shapes):
        if shape.source not in sources:
            raise SponError.of(f"{name}: shapes[{i}].source", shape.source, f"one of {', '.join(sources)}")
    return Device(sources, tuple(shapes))


def _shape(data: Any, name: str) -> Shape:
    _keys(data, {field.name for field in fields(Shape)}, name)
    dtypes = data["dtypes"]
    if not isinstance(dtypes, list) or not dtypes or not all(dtype in (*DTYPES, *FORMATS) for dtype in dtypes):
        raise SponError.of(f"{name}.dtypes", dtypes, f"a list of {', '.join((*DTYPES, *FORMATS))}")
    if not isinstance(data["source"], str):
        raise SponError.of(f"{name}.source", data["source"], "a label of the file's sources")
    for key in ("in_features", "out_features"):
        _integer(data[key], f"{name}.{key}", 1)
    crossover = _integer(data["crossover"], f"{name}.crossover", 0, GPU_ROWS)
    if not isinstance(data["launches"], dict):
        raise SponError.of(f"{name}.launches", data["launches"], "launches by their largest number of rows")
    launches = {}
    for rows, launch in data["launches"].items():
        if not rows.isdecimal():
            raise SponError.of(f"{name}.launches", rows, "a number of rows")
        launches[int(rows)] = _launch(launch, f"{name}.launches[{rows}]")
    if max(launches, default=0) < crossover:
        raise SponError.of(f"{name}.launches", sorted(launches), f"a launch for every batch up to {crossover}")
    for rows, dtype in itertools.product(launches, dtypes):
        if (kernel := launches[rows].kernel) not in kernels(dtype, rows):
            expected = "dense_mask, the one kernel for several rows and weights with scales"
            raise SponError.of(f"{name}.launches[{rows}].kernel", kernel, expected)
    launches = dict(sorted(launches.items()))
    return Shape(data["source"], tuple(dtypes), data["in_features"], data["out_features"], crossover, launches)


def _launch(data: Any, name: str) -> Launch:
    _keys(data, {field.name for field in fields(Launch)}, name)
    if data["kernel"] not in KERNELS:
        raise SponError.of(f"{name}.kernel", data["kernel"], f"one of {', '.join(KERNELS)}")
    for key, least, most in (("block_in", 16, 1024), ("block_out", 16, 4096), ("num_warps", 1, 32)):
        value = _integer(data[key], f"{name}.{key}", least, most)
        if value != next_power_of_two(value):
            raise SponError.of(f"{name}.{key}", value, "a power of two")
    if data["splits"] is not None:
        _integer(data["splits"], f"{name}.splits", 1, MAX_SPLITS)
    _integer(data["num_stages"], f"{name}.num_stages", 1, 8)
    # More would leave a thread less than 32 registers.
    _integer(data["resident"], f"{name}.resident", 1, max(1, 64 // data["num_warps"]))
    return Launch(**data)


def _keys(data: Any, expected: set[str], name: str) -> None:
    if not isinstance(data, dict):
        raise SponError.of(name, data, "an object")
    for key in sorted(data.keys() ^ expected):
        problem = "an unknown key" if key in data else "no such key"
        raise SponError.of(f"{name}: {key}", problem, f"exactly the keys {', '.join(sorted(expected))}")


def _integer(value: Any, name: str, least: int, most: int | None = None) -> int:
    if type(value) is not int or value < least or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most}"
        raise SponError.of(name, value, f"an integer of at least {least}{upper}")
    return value
