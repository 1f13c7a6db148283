# SPDX-License-Identifier: Apache-2.0
"""Measure the GPU at hand, and write the configuration that `sparse_linear` will use on it.

    python -m benchmarks.tune_sparse_linear --device cuda

For each shape, dtype and number of rows, both kernels' block sizes, splits, warps, stages and registers are searched
one at a time from the present configuration on, cold (see `benchmarks.timing`), until nothing helps. The crossover is
the largest number of rows up to which the best kernel beats the masked dense GEMM. Masks are those of independent
Gaussian rows, the least favourable to batches. Shapes that were not tuned stay in the file as they are, and the file is
written after each shape, so that an interrupted run loses one shape at most.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import copies_for, median_seconds
from spon_plugin import SponError
from spon_plugin.kernels import gemm
from spon_plugin.kernels.triton import configs
from spon_plugin.kernels.triton.configs import DTYPES, KERNELS, Device, Launch, Shape

AXES: dict[str, tuple[int, ...]] = {
    "splits": (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 48, 64),
    "block_out": (32, 64, 128, 256, 512),
    "block_in": (16, 32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4),
    "resident": (1, 2, 3, 4, 5, 6, 7, 8),
}
# The linears of Llama-3-8B, fused and single: qkv, o, gate or up, gate_up, down.
SHAPES = "4096x6144,4096x4096,4096x14336,4096x28672,14336x4096"
START = Launch("dense_mask", block_in=32, block_out=128, splits=8, num_warps=4, num_stages=1, resident=6)

# Below, a thread's registers spill.
LEAST_REGISTERS = 32

Seconds = Callable[[Launch], float]


def descend(start: Launch, seconds: Seconds) -> tuple[Launch, float]:
    """The launch that no change of one of `AXES` makes faster, and its time.

    Args:
        start: where to begin.
        seconds: measures a launch; infinite if it cannot run.
    """
    best, least = start, seconds(start)
    improved = True
    while improved:
        improved = False
        for axis, values in AXES.items():
            for value in values:
                candidate = replace(best, **{axis: value})
                # A change that is lost in the noise is no reason to go on.
                if candidate != best and (taken := seconds(candidate)) < 0.99 * least:
                    best, least, improved = candidate, taken, True
    return best, least


def tune_rows(start: Launch, seconds: Seconds) -> tuple[Launch, float]:
    """The fastest launch of any kernel for one shape, dtype and number of rows.

    Args:
        start: where to begin, with either kernel.
        seconds: see `descend`.
    """
    known: dict[Launch, float] = {}

    def remembered(launch: Launch) -> float:
        if launch not in known:
            known[launch] = seconds(launch)
        return known[launch]

    return min((descend(replace(start, kernel=kernel), remembered) for kernel in KERNELS), key=lambda pair: pair[1])


def tune_shape(
    dtype: str,
    in_features: int,
    out_features: int,
    rows: Sequence[int],
    start: Callable[[int], Launch],
    timer: Callable[[int], tuple[Seconds, float]],
    source: str,
    say: Callable[[str], None],
) -> Shape:
    """Tune one shape at ascending numbers of rows, up to the first at which the dense GEMM wins.

    Args:
        dtype: name of the dtype.
        in_features: channels.
        out_features: columns.
        rows: numbers of rows to tune for, ascending.
        start: for a number of rows, the launch to begin with.
        timer: for a number of rows, what measures a launch, and the seconds of the masked dense GEMM.
        source: label of where the values come from.
        say: takes a line of progress.
    """
    launches: dict[int, Launch] = {}
    for count in rows:
        seconds, dense = timer(count)
        launch, taken = tune_rows(start(count), seconds)
        say(
            f"{dtype} {in_features}x{out_features} rows {count}: {taken * 1e6:.1f} us, dense {dense * 1e6:.1f} us "
            f"({dense / taken:.2f}x) {launch}"
        )
        if taken >= dense:
            break
        launches[count] = launch
    return Shape(source, (dtype,), in_features, out_features, max(launches, default=0), launches)


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


def cuda_timer(
    dtype: torch.dtype, in_features: int, out_features: int, sparsity: float, seconds: float
) -> Callable[[int], tuple[Seconds, float]]:
    """What measures a shape on the current CUDA device; see `tune_shape`."""
    device = torch.device("cuda")
    element = torch.empty(0, dtype=dtype).element_size()
    copies = copies_for(in_features * out_features * element, device)
    weights = [torch.randn(in_features, out_features, dtype=dtype, device=device) / 64 for _ in range(copies)]
    bias = torch.zeros(out_features, dtype=dtype, device=device)

    def timer(rows: int) -> tuple[Seconds, float]:
        x = torch.randn(rows, in_features, dtype=dtype, device=device)
        threshold = x.abs().float().flatten().quantile(sparsity).view(1)

        def sparse(launch: Launch) -> float:
            kernel = import_module(f"spon_plugin.kernels.triton.{launch.kernel}").sparse_linear
            if launch.maxnreg < LEAST_REGISTERS or launch != launch.fitted(
                in_features, (out_features,), multiprocessors()
            ):
                return float("inf")
            try:
                return median_seconds(
                    lambda i: kernel(x, weights[i], threshold, bias, launch=launch), copies, device, seconds
                )
            except Exception as error:
                if type(error).__name__ != "OutOfResources":
                    raise
                return float("inf")

        def dense(i: int) -> torch.Tensor:
            return gemm.sparse_linear(x, weights[i], threshold, bias)

        return sparse, median_seconds(dense, copies, device, seconds)

    return timer


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
    parser.add_argument("--dtype", default="bfloat16", help=f"comma-separated: {', '.join(DTYPES)}")
    parser.add_argument("--shapes", default=SHAPES, help="INxOUT, comma-separated (default: %(default)s)")
    parser.add_argument("--rows", default="1,2,4,8,16", help="numbers of rows, ascending (default: %(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of inputs to mask (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.05, help="to measure each candidate for")
    parser.add_argument(
        "--output", type=Path, help="where to write (default: the file that serves the GPU, or a new one)"
    )
    options = parser.parse_args(arguments)
    if options.device != "cuda" or not torch.cuda.is_available():
        raise SponError.of("--device", options.device, "cuda, and a CUDA device to measure", "Nothing was written.")
    for kind in options.dtype.split(","):
        if kind not in DTYPES:
            raise SponError.of("--dtype", kind, f"one of {', '.join(DTYPES)}")
    counts = [int(count) for count in options.rows.split(",")]
    shapes = list(parse_shapes(options.shapes))

    name = torch.cuda.get_device_name()
    present = configs.file_of(name)
    own = configs.DIRECTORY / file_name(name) if present.stem == configs.DEFAULT else present
    path = options.output or own
    old = configs.read(path) if path.exists() else Device({}, ())
    text = (
        f"measured by benchmarks.tune_sparse_linear on {name}, torch {torch.__version__}, "
        f"Triton {import_module('triton').__version__}, sparsity {options.sparsity}"
    )
    label = label_of(text, old.sources)
    new: list[Shape] = []
    for kind in options.dtype.split(","):
        for shape in shapes:
            timer = cuda_timer(DTYPES[kind], *shape, options.sparsity, options.seconds)
            begin = partial(first_launch, configs.nearest(configs.shapes_of(name, DTYPES[kind]), *shape), shape)
            tuned = tune_shape(kind, *shape, counts, begin, timer, label, print)
            # float16 moves the same bytes through the same instructions.
            new.append(replace(tuned, dtypes=("bfloat16", "float16")) if kind == "bfloat16" else tuned)
            write(path, merged(old, new, {label: text}))
    print(path)
    return path


def first_launch(nearest: Shape, shape: tuple[int, int], rows: int) -> Launch:
    """Where to begin for a shape: at what the present configuration would launch."""
    fit = [launch for most, launch in nearest.launches.items() if rows <= most]
    return (fit or [START])[0].fitted(shape[0], shape[1:], multiprocessors())


def multiprocessors() -> int:
    """Those of the current CUDA device."""
    return torch.cuda.get_device_properties(None).multi_processor_count


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
