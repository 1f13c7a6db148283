# SPDX-License-Identifier: Apache-2.0
"""A decode step's linears, one after the other as in a model: microseconds a block, dense and sparse, in one run.

    python -m benchmarks.block_stack --device cuda --blocks 4 --marlin MARLIN.so --json OUT

Blocks of Llama-3-8B: RMSNorm, qkv, o, RMSNorm, gate_up, SiLU, down, one row, in bfloat16 (Marlin: float16). Attention
is left out; o takes the queries. On a GPU all blocks of a variant are one CUDA graph, and variants take
turns. Every block has weights of its own, so that they come from memory. A threshold is the quantile of its own input,
measured in the stack, so that each linear masks the share that is asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import cuda_baselines
from benchmarks.formats import make, nbytes
from benchmarks.timing import interleaved_medians
from spon_plugin import RowWeight, SponError
from spon_plugin.kernels import sparse_linear
from spon_plugin.machine import DTYPES, device_name
from spon_plugin.weights.scaled import ScaledWeight

# hidden, intermediate, and the widths of keys and values together, of Llama-3-8B.
SIZES = (4096, 14336, 2048)
FORMATS = ("dense", "int8", "fp8", "int4")
GROUP = 128

Product = Callable[[Tensor], Tensor]


def shapes(sizes: tuple[int, int, int]) -> dict[str, tuple[int, int]]:
    """in_features and out_features of a block's linears, as vLLM fuses them."""
    hidden, intermediate, keys_values = sizes
    return {
        "qkv": (hidden, hidden + keys_values),
        "o": (hidden, hidden),
        "gate_up": (hidden, 2 * intermediate),
        "down": (intermediate, hidden),
    }


class Masked:
    """A linear by our kernels: the inputs below its threshold are skipped.

    Attributes:
        weight: its weight.
        threshold: float32 ``[1]``; as it is made, nothing is below it.
        skipped: the share of inputs that were, when the threshold was set.
    """

    def __init__(self, weight: RowWeight) -> None:
        self.weight = weight
        self.threshold = torch.full((1,), -1.0, device=weight.codes.device)
        self.skipped = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """``S(x) W^T``."""
        return sparse_linear(x, self.weight, self.threshold)

    def mask(self, x: Tensor, sparsity: float) -> None:
        """Set the threshold to mask a share of this input."""
        magnitudes = x.float().abs().flatten()
        self.threshold.copy_(magnitudes.quantile(sparsity).view(1))
        self.skipped = float((magnitudes <= self.threshold).float().mean())


def step(
    blocks: Sequence[Mapping[str, Product]], x: Tensor, see: Callable[[Product, Tensor], None] | None = None
) -> Tensor:
    """One token through all blocks, ``[1, hidden]``; `see` gets each linear and its input before it runs."""
    hidden = x.shape[-1]

    def linear(product: Product, value: Tensor) -> Tensor:
        if see is not None:
            see(product, value)
        return product(value)

    for block in blocks:
        queries = linear(block["qkv"], F.rms_norm(x, (hidden,)))[:, :hidden].contiguous()
        x = x + linear(block["o"], queries)
        gate, up = linear(block["gate_up"], F.rms_norm(x, (hidden,))).chunk(2, -1)
        x = x + linear(block["down"], F.silu(gate) * up)
    return x


def weights_of(
    format: str, sizes: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, RowWeight]:
    """A block's weights, small enough for float16."""
    made = {}
    for name, shape in shapes(sizes).items():
        weight = make(format, shape, dtype, GROUP if format == "int4" else 0, generator)
        (weight.scales if isinstance(weight, ScaledWeight) else weight.codes).mul_(shape[0] ** -0.5)
        made[name] = weight
    return made


def measure(
    formats: Sequence[str],
    sparsities: Sequence[float],
    sizes: tuple[int, int, int],
    blocks: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    library: Path | None = None,
) -> list[dict[str, Any]]:
    """A row a variant.

    Args:
        formats: of our kernels' weights.
        sparsities: of our kernels; 0 masks nothing.
        sizes: hidden, intermediate, keys and values.
        blocks: how many.
        device: where.
        dtype: of activations and dense weights.
        seconds: to measure for, in all.
        library: Marlin's.
    """
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, sizes[0], generator=generator, device=device).to(dtype)
    calls: dict[str, Callable[[int], object]] = {}
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, format: str, sparsity: float, skipped: float, size: int, call: Callable[[], Tensor]) -> None:
        try:
            finite = bool(call().isfinite().all())
        except (RuntimeError, OSError, SponError) as error:
            print(f"{name} left out: {error}", file=sys.stderr, flush=True)
            return
        rows[name] = {"variant": name, "format": format, "sparsity": sparsity, "skipped": skipped, "bytes": size}
        rows[name]["finite"] = finite
        calls[name] = lambda i: call()

    for format in formats:
        weights = [weights_of(format, sizes, dtype, generator) for _ in range(blocks)]
        size = sum(nbytes(weight) for block in weights for weight in block.values()) // blocks
        if format == "dense":
            dense = [
                {name: partial(F.linear, weight=w.codes.t().contiguous()) for name, w in b.items()} for b in weights
            ]
            add("torch", "dense", 0.0, 0.0, size, partial(step, dense, x))
        elif device.type == "cuda" and format == "int4":
            for name, given in (("packed", x), ("marlin", x.half())):
                found = [{key: _baseline(name, w, library) for key, w in block.items()} for block in weights]
                if all(product for block in found for product in block.values()):
                    add(f"int4 {name}", format, 0.0, 0.0, size, partial(step, found, given))
        for sparsity in sparsities:
            masked = [{name: Masked(weight) for name, weight in block.items()} for block in weights]
            if sparsity > 0:
                step(masked, x, lambda linear, value, sparsity=sparsity: linear.mask(value, sparsity))
            linears = [(linear, nbytes(linear.weight)) for block in masked for linear in block.values()]
            skipped = sum(linear.skipped * part for linear, part in linears) / sum(part for _, part in linears)
            add(f"{format} {sparsity:.0%}", format, sparsity, skipped, size, partial(step, masked, x))
    times = interleaved_medians(calls, 1, device, seconds)
    for name, row in rows.items():
        row["microseconds_per_block"] = times[name] * 1e6 / blocks
        row["over_torch"] = times["torch"] / times[name] if "torch" in times else None
        row["gigabytes_per_second"] = row["bytes"] * (1 - row["skipped"]) * blocks / times[name] / 1e9
    return list(rows.values())


def _baseline(name: str, weight: RowWeight, library: Path | None) -> Product | None:
    assert isinstance(weight, ScaledWeight)
    tried = torch.randn(1, weight.in_features, device=weight.codes.device).bfloat16()
    return cuda_baselines.products(weight, tried, library).get(name)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| weights | skipped | µs a block | GB/s | over torch |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        over = "" if row["over_torch"] is None else f"{row['over_torch']:.2f}"
        lines.append(
            f"| {row['variant']} | {row['skipped']:.1%} | {row['microseconds_per_block']:.1f} "
            f"| {row['gigabytes_per_second']:.0f} | {over} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--format", default=",".join(FORMATS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--sparsity", default="0,0.4,0.5,0.6", help="comma-separated (default: %(default)s)")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="hidden,intermediate,keys and values")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring, for all variants together")
    parser.add_argument("--marlin", type=Path, help="a shared library of Marlin, for int4 on a GPU")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    hidden, intermediate, keys_values = (int(size) for size in options.sizes.split(","))
    sparsities = [float(value) for value in options.sparsity.split(",")]
    with torch.no_grad():
        rows = measure(
            options.format.split(","),
            sparsities,
            (hidden, intermediate, keys_values),
            options.blocks,
            device,
            DTYPES[options.dtype],
            options.seconds,
            options.marlin,
        )
    print(table(rows), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"device": device_name(device), "torch": torch.__version__, "blocks": options.blocks, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
