# SPDX-License-Identifier: Apache-2.0
"""How fast `sparse_linear` is, against the best dense baselines of the same run.

    python -m benchmarks.sparse_linear --device cpu --dtype bfloat16 --shapes llama3-8b --sparsity 0,0.5,0.7 --batch 1
    python -m benchmarks.sparse_linear --format int4 --group 128 --shapes 4096x14336,14336x4096 --batch 1

Weights are cold: calls rotate over copies that exceed the cache several times. All variants of a shape and batch are
measured in turns, so that they see the same machine, and medians are reported. Dense baselines: torch's linear layer on
its own layout, in `--dtype` and in float32 where the machine emulates that; our kernel with nothing masked; torch's own
kernel for the format of `--format`, where it has one; oneDNN's packed weight for more than 8 rows on a CPU (prompts:
``--sparsity 0 --batch 16,128,512``), in float32 where the machine emulates `--dtype`; on a GPU Marlin too, from
`--marlin` (`benchmarks.marlin`).
`read` is a bandwidth measured in the same turns: on a CPU, that at which torch sums up the cold weights; on a GPU, that
of bytes read and written by a copy.
Inputs are Gaussian and independent between rows, the worst case for a batch; `benchmarks.real_masks` has real ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda_baselines import copier
from benchmarks.formats import FORMATS, alias, baselines, clone, make, nbytes, words
from benchmarks.timing import copies_for, interleaved_medians
from spon_plugin import SponError
from spon_plugin.kernels import sparse_linear
from spon_plugin.machine import DTYPES, device_name

# (in_features, out_features) of each model's linears; the last two of the large ones are vLLM's fused layers.
SHAPES = {
    "llama3-8b": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (4096, 6144), (4096, 28672)],
    "qwen3-8b": [(4096, 4096), (4096, 1024), (4096, 12288), (12288, 4096), (4096, 6144), (4096, 24576)],
    "mistral-7b": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (4096, 6144), (4096, 28672)],
    "smollm2": [(576, 576), (576, 192), (576, 1536), (1536, 576), (576, 960), (576, 3072)],
}


def measure(
    shape: tuple[int, int],
    batch: int,
    sparsities: list[float],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    format: str = "dense",
    group: int = 0,
    library: Path | None = None,
) -> list[dict[str, Any]]:
    """The rows of one shape and batch, one for each sparsity; `library` is Marlin's."""
    in_features, out_features = shape
    generator = torch.Generator(device).manual_seed(0)
    weight = make(format, shape, dtype, group, generator)
    size = nbytes(weight)
    copies = copies_for(size, device)
    weights = [clone(weight) for _ in range(copies)]
    x = torch.randn(batch, in_features, generator=generator, device=device).to(dtype)
    bias = torch.randn(out_features, generator=generator, device=device).to(dtype)
    quantiles = {s: torch.quantile(x.float().abs().flatten()[: 1 << 24], s).reshape(1) for s in sparsities if s > 0}
    thresholds = {s: quantiles.get(s, torch.full((1,), -1.0, device=device)) for s in sparsities}

    calls: dict[str, Callable[[int], object]] = {**baselines(weights, x, bias, group, library)}
    for sparsity in sorted({0.0, *sparsities}):
        threshold = thresholds.get(sparsity, torch.full((1,), -1.0, device=device))
        own = [alias(weight) for weight in weights]
        calls[str(sparsity)] = lambda i, own=own, threshold=threshold: sparse_linear(x, own[i], threshold, bias)  # type: ignore[misc]
    if device.type == "cpu":
        memory = [words(weight) for weight in weights]
        calls["read"] = lambda i: [part.sum() for part in memory[i]]
        moved = sum(part.nbytes for part in memory[0])
    else:
        calls["read"], moved = copier(device)
    times = interleaved_medians(calls, copies, device, seconds)
    read = moved / times["read"] / 1e9

    rows = []
    for sparsity in sparsities:
        taken = times[str(sparsity)]
        skipped = float((x.abs() <= thresholds[sparsity]).all(0).float().mean())
        rows.append(
            {
                "in_features": in_features,
                "out_features": out_features,
                "batch": batch,
                "sparsity": sparsity,
                "skipped": skipped,
                "microseconds": taken * 1e6,
                "format": format,
                "group": group,
                "gigabytes_per_second": size * (1 - skipped) / taken / 1e9,
                "torch_microseconds": times["torch"] * 1e6,
                "over_torch": times["torch"] / taken,
                "over_torch_float32": times["torch float32"] / taken if "torch float32" in times else None,
                "over_onednn": times["oneDNN"] / taken if "oneDNN" in times else None,
                "packed_microseconds": times["packed"] * 1e6 if "packed" in times else None,
                "over_packed": times["packed"] / taken if "packed" in times else None,
                "marlin_microseconds": times["marlin"] * 1e6 if "marlin" in times else None,
                "over_marlin": times["marlin"] / taken if "marlin" in times else None,
                "over_own_dense": times["0.0"] / taken,
                "share_of_ideal": times["0.0"] / taken * (1 - skipped),
                "read_gigabytes_per_second": read,
                "share_of_read": size * (1 - skipped) / taken / 1e9 / read,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = "| in x out | format | batch | sparsity | skipped | µs | GB/s | read GB/s | torch µs | over torch "
    lines = [head + "| over float32 | over oneDNN | over packed | over Marlin | over own dense | of ideal | of read |"]
    lines.append("| --- | --- " + "| ---: " * 15 + "|")
    for row in rows:
        size = f" g{row['group']}" if row["group"] else ""
        ratios = ("over_torch", "over_torch_float32", "over_onednn", "over_packed", "over_marlin", "over_own_dense")
        cells = [
            f"{row['in_features']} x {row['out_features']}",
            f"{row['format']}{size}",
            f"{row['batch']}",
            f"{row['sparsity']:.0%}",
            f"{row['skipped']:.1%}",
            f"{row['microseconds']:.1f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['read_gigabytes_per_second']:.1f}",
            f"{row['torch_microseconds']:.1f}",
            *("" if row[name] is None else f"{row[name]:.2f}" for name in (*ratios, "share_of_ideal", "share_of_read")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratio to torch against sparsity at the smallest batch, a line per shape, and the ideal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    batch = min(row["batch"] for row in rows)
    chosen = [row for row in rows if row["batch"] == batch]
    for shape in dict.fromkeys((row["in_features"], row["out_features"]) for row in chosen):
        line = [row for row in chosen if (row["in_features"], row["out_features"]) == shape]
        axes.plot(
            [r["sparsity"] for r in line], [r["over_torch"] for r in line], "o-", label=f"{shape[0]} x {shape[1]}"
        )
    sparsities = sorted({row["sparsity"] for row in chosen})
    axes.plot(sparsities, [1 / (1 - s) for s in sparsities], "k--", label="1 / (1 - sparsity)")
    axes.set(xlabel="sparsity", ylabel="times as fast as torch", title=f"sparse_linear, batch {batch}", ylim=(0, None))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--format", default="dense", help="of the weights, comma-separated: " + ", ".join(FORMATS))
    parser.add_argument("--group", type=int, help="inputs that share a scale; default 128 for int4, else all of them")
    parser.add_argument("--shapes", default="llama3-8b", help="models (" + ", ".join(SHAPES) + "), or INxOUT,INxOUT")
    parser.add_argument("--sparsity", default="0,0.25,0.4,0.5,0.6,0.7")
    parser.add_argument("--batch", default="1,2,4,8")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring for each shape and batch")
    parser.add_argument("--marlin", type=Path, help="a shared library of Marlin, for int4 on a GPU")
    parser.add_argument(
        "--json",
        type=Path,
        help="write the rows there as they come, and a plot beside them (.png) if all have one format",
    )
    arguments = parser.parse_args()

    shapes: list[tuple[int, int]] = []
    for name in arguments.shapes.split(","):
        shapes += SHAPES.get(name) or [tuple(int(size) for size in name.split("x"))]  # type: ignore[list-item]
    device = torch.device(arguments.device)
    formats = arguments.format.split(",")
    if not set(formats) <= set(FORMATS):
        raise SponError.of("--format", arguments.format, f"comma-separated: {', '.join(FORMATS)}")
    sparsities = [float(value) for value in arguments.sparsity.split(",")]
    dtype, seconds = DTYPES[arguments.dtype], arguments.seconds
    batches = [int(value) for value in arguments.batch.split(",")]
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for format, shape, batch in itertools.product(formats, dict.fromkeys(shapes), batches):
            group = (128 if format == "int4" else 0) if arguments.group is None else arguments.group
            found = measure(shape, batch, sparsities, dtype, device, seconds, format, group, arguments.marlin)
            print(table(found).split("\n", 2)[2] if rows else table(found), flush=True)
            rows += found
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                result = {"device": device_name(device), "torch": torch.__version__, "dtype": arguments.dtype}
                arguments.json.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    if arguments.json and len(formats) == 1:
        plot(rows, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
