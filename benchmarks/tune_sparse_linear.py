# SPDX-License-Identifier: Apache-2.0
"""Measure the GPU at hand, and write the configuration that `sparse_linear` will use on it.

    python -m benchmarks.tune_sparse_linear --device cuda --format dense,int8,int4,fp8 --budget 150

For each shape, format and number of rows: first the launches of a reasoned list (`benchmarks.launches`), then the
neighbours of the best, until none is faster; cold (see `benchmarks.timing`). Launches compile in other processes, one a
core, while others are measured. Everything's list comes before anything's neighbours, and one row before several, so
that a budget that ends early has been spent where most is to gain. Of matrices the crossover is found too, the largest
number of rows up to which the best kernel beats the masked dense GEMM. Masks are those of independent Gaussian rows,
the least favourable to batches. What was not tuned stays in the file, which is written after each step, as it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.formats import FORMATS
from benchmarks.tuning import Search, Task, Timer, fit, tune
from spon_plugin import SponError
from spon_plugin.kernels.triton import configs
from spon_plugin.kernels.triton.configs import DTYPES, Device, Launch, Shape

# The linears of Llama-3-8B, fused and single: qkv, o, down, gate_up, gate or up.
SHAPES = "4096x6144,4096x4096,14336x4096,4096x28672,4096x14336"
START = Launch("dense_mask", block_in=32, block_out=128, splits=None, num_warps=4, num_stages=1, resident=6)


def combined(old: Shape, kind: str, found: Sequence[Search], dense: Mapping[int, float], source: str) -> Shape:
    """A shape with what was found for some numbers of rows, and what it had for others.

    Args:
        old: as it was, or the nearest one.
        kind: dtype or format.
        found: of one shape, with a best launch each.
        dense: seconds of the masked dense GEMM by rows; empty for weights with scales, which it would have to decode.
        source: label of where the values come from.
    """
    shape = found[0].task.shape
    best = {search.task.rows: search for search in sorted(found, key=lambda search: search.task.rows)}
    lost = [rows for rows, search in best.items() if rows in dense and search.seconds >= dense[rows]]
    won = [rows for rows in best if not lost or rows < lost[0]]
    launches = {rows: launch for rows in won if (launch := best[rows].best)}
    crossover = max(launches, default=0)
    if not lost:
        launches |= {most: one.fitted(*fit(shape)) for most, one in old.launches.items() if most > max(best)}
        launches = {most: replace(one, splits=None) for most, one in launches.items()}
        crossover = max(old.crossover, crossover)
    # float16 moves the same bytes through the same instructions.
    dtypes = ("bfloat16", "float16") if kind == "bfloat16" else (kind,)
    return Shape(source, dtypes, *shape, crossover, dict(sorted(launches.items())))


def label_of(text: str, sources: Mapping[str, str]) -> str:
    """The label under which `sources` has `text`, or a new one."""
    labels = [label for label, known in sources.items() if known == text]
    numbered = (f"measured {number}" for number in itertools.count(1))
    return labels[0] if labels else next(label for label in numbered if label not in sources)


def merged(old: Device, new: Sequence[Shape], sources: Mapping[str, str]) -> Device:
    """A file after tuning: the new shapes, and of the old ones what was not tuned again, each with its source.

    Args:
        old: the file as it was.
        new: what was tuned.
        sources: where the new shapes come from, by label.
    """
    tuned = {(dtype, shape.in_features, shape.out_features) for shape in new for dtype in shape.dtypes}
    shapes = list(new)
    for shape in old.shapes:
        dtypes = [name for name in shape.dtypes if (name, shape.in_features, shape.out_features) not in tuned]
        if dtypes:
            shapes.append(replace(shape, dtypes=tuple(dtypes)))
    used = {shape.source for shape in shapes}
    return Device({label: text for label, text in {**old.sources, **sources}.items() if label in used}, tuple(shapes))


def as_json(device: Device) -> dict[str, Any]:
    """The file's content; `configs.parse` reads it back."""
    data = {"format_version": configs.FORMAT_VERSION, **asdict(device)}
    return json.loads(json.dumps(data))


def file_name(device: str) -> str:
    """The name of a device's file: its words but for the size of its memory."""
    words = configs.words_of(device)
    return "_".join(word for word in words if not (word.endswith("gb") and word[:-2].isdecimal())) + ".json"


def parse_shapes(text: str) -> Iterator[tuple[int, int]]:
    """``"4096x14336,..."`` as pairs.

    Raises:
        SponError: it is not of that form.
    """
    for item in text.split(","):
        sides = item.strip().split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
            raise SponError.of("--shapes", item, "INxOUT, comma-separated", "For example 4096x14336.")
        yield int(sides[0]), int(sides[1])


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure the GPU at hand and write its configuration; returns the file.

    Raises:
        SponError: no CUDA device, or options that make no sense.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_sparse_linear", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, the only kind of device with anything to tune")
    parser.add_argument("--dtype", default="bfloat16", help=f"of dense weights, comma-separated: {', '.join(DTYPES)}")
    parser.add_argument("--format", default="dense", help=f"comma-separated: {', '.join(FORMATS)}")
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale of int4; of others all do")
    parser.add_argument("--shapes", default=SHAPES, help="INxOUT, comma-separated (default: %(default)s)")
    parser.add_argument("--rows", default="1,2,4,8,16", help="numbers of rows, ascending (default: %(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of inputs to mask (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.02, help="to measure each candidate for")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for everything (default: no limit)")
    parser.add_argument("--json", type=Path, help="write every launch that was measured there")
    parser.add_argument(
        "--output", type=Path, help="where to write (default: the file that serves the GPU, or a new one)"
    )
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.budget
    if options.device != "cuda" or not torch.cuda.is_available():
        raise SponError.of("--device", options.device, "cuda, and a CUDA device to measure", "Nothing was written.")
    formats, dtypes = options.format.split(","), options.dtype.split(",")
    for name, given, known in (("--format", formats, FORMATS), ("--dtype", dtypes, tuple(DTYPES))):
        if wrong := [one for one in given if one not in known]:
            raise SponError.of(name, wrong[0], f"one of {', '.join(known)}")
    kinds = [kind for format in formats for kind in (dtypes if format == "dense" else [format])]
    shapes = list(parse_shapes(options.shapes))
    counts = [int(count) for count in options.rows.split(",")]
    stages = [
        [
            Task(kind, shape, rows, options.group if kind == "int4" else 0)
            for shape, kind in itertools.product(shapes, kinds)
            # Products of several rows of float32 run outside the tensor cores.
            if rows == 1 or kind != "float32"
        ]
        for rows in counts
    ]

    name = torch.cuda.get_device_name()
    present = configs.file_of(name)
    own = configs.DIRECTORY / file_name(name) if present.stem == configs.DEFAULT else present
    path = options.output or own
    old = next((configs.read(known) for known in (path, own) if known.exists()), Device({}, ()))
    text = (
        f"measured by benchmarks.tune_sparse_linear on {name}, torch {torch.__version__}, "
        f"Triton {import_module('triton').__version__}, sparsity {options.sparsity}"
    )
    done = Tuned(name, old, text, path, options.json)
    with torch.no_grad():
        tune(stages, Timer(options.sparsity, options.seconds), done, end)
    print(path)
    return path


class Tuned:
    """What was found so far, and the file that it is written to."""

    def __init__(self, name: str, old: Device, text: str, path: Path, log: Path | None) -> None:
        self._name, self._old, self._text, self._path, self._log = name, old, text, path, log
        self._searches: list[Search] = []
        self._dense: dict[Task, float] = {}

    def present(self, task: Task) -> Launch:
        """What would be launched for a task as it is."""
        enough = [launch for most, launch in self._nearest(task).launches.items() if task.rows <= most]
        return replace((enough or [START])[0].fitted(*fit(task.shape)), splits=None)

    def add(self, search: Search, dense: float) -> None:
        """Take in what a search has found, say it, and write the file."""
        task = search.task
        self._dense[task] = dense
        if search not in self._searches:
            self._searches.append(search)
        print(
            f"{task.kind} {task.shape[0]}x{task.shape[1]} rows {task.rows}: {search.seconds * 1e6:.1f} us, dense "
            f"{dense * 1e6:.1f} us ({dense / search.seconds:.2f}x) {len(search.known)} measured {search.best}",
            flush=True,
        )
        self.write()

    def write(self) -> None:
        """Write the configuration, and the log if there is one."""
        groups: dict[tuple[str, tuple[int, int]], list[Search]] = {}
        for search in self._searches:
            if search.best is not None:
                groups.setdefault((search.task.kind, search.task.shape), []).append(search)
        sources: dict[str, str] = {}
        new = []
        for (kind, _), found in groups.items():
            rows = sorted(search.task.rows for search in found)
            text = f"{self._text}, rows {', '.join(map(str, rows))}; other numbers of rows reasoned, not measured"
            label = label_of(text, {**self._old.sources, **sources})
            sources[label] = text
            dense = {search.task.rows: self._dense[search.task] for search in found if kind in DTYPES}
            new.append(combined(self._nearest(found[0].task), kind, found, dense, label))
        if new:
            write(self._path, merged(self._old, new, sources))
        if self._log:
            lines = [
                {**asdict(search.task), **asdict(launch), "microseconds": taken * 1e6 if taken < float("inf") else None}
                for search in self._searches
                for launch, taken in search.known.items()
            ]
            self._log.write_text(json.dumps({"device": self._name, "launches": lines}) + "\n", encoding="utf-8")

    def _nearest(self, task: Task) -> Shape:
        kind = DTYPES.get(task.kind, task.kind)
        known = [shape for shape in self._old.shapes if task.kind in shape.dtypes]
        return configs.nearest(known or configs.shapes_of(self._name, kind), *task.shape)


def write(path: Path, device: Device) -> None:
    """Write a file of `configs/`, whole or not at all.

    Raises:
        SponError: what would be written could not be read.
    """
    data = as_json(device)
    configs.parse(data, path.name)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main()
