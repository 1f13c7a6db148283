# SPDX-License-Identifier: Apache-2.0
"""What masks of real activations leave to skip in a batch, and what that is worth.

    python -m benchmarks.real_masks MODEL --text FILE --sparsity 0.5,0.7 --json OUT

A batch must read a weight row that any of its tokens keeps. Independent masks of sparsity s leave s^B to skip at batch
B; real ones overlap. The inputs of every site are recorded once: the last tokens of as many different windows of the
text as the largest batch has rows, which is what a server decodes together. Each site's threshold is the quantile of
its own inputs over whole windows. Times are those of `sparse_linear` on these inputs, cold, against torch's linear.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.timing import copies_for, interleaved_medians
from spon_plugin.calibration.text import leading_windows, read_text
from spon_plugin.decoder.sites import Site, find_sites
from spon_plugin.kernels import sparse_linear
from spon_plugin.machine import DTYPES, device_name

WINDOW = 128


@torch.no_grad()
def record(model: nn.Module, sites: list[Site], windows: Tensor) -> dict[str, Tensor]:
    """The input of each site, ``[windows, tokens, in_features]``, by the site's name."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0].detach()

        return hook

    handles = [model.get_submodule(s.modules[0]).register_forward_pre_hook(watch(s.name)) for s in sites]
    model(windows)
    for handle in handles:
        handle.remove()
    return found


def time_layer(linear: nn.Linear, rows: Tensor, threshold: Tensor, seconds: float) -> dict[str, float]:
    """Seconds of torch's linear and of `sparse_linear` on `rows`, weights cold."""
    weight, device = linear.weight.detach(), rows.device
    copies = copies_for(weight.numel() * weight.element_size(), device)
    dense = [weight.clone() for _ in range(copies)]
    laid_out = [weight.t().contiguous() for _ in range(copies)]
    calls = {
        "torch": lambda i: F.linear(rows, dense[i]),
        "sparse": lambda i: sparse_linear(rows, laid_out[i], threshold),
    }
    return interleaved_medians(calls, copies, device, seconds)


@torch.no_grad()
def measure(
    model: nn.Module, windows: Tensor, sparsities: list[float], batches: list[int], seconds: float
) -> list[dict[str, Any]]:
    """One row for each role, sparsity and batch: shares averaged over the blocks, times of the middle block."""
    sites = find_sites(model)
    inputs = record(model, sites, windows)
    blocks = list(dict.fromkeys(site.block for site in sites))
    rows = []
    for sparsity in sparsities:
        kept: dict[tuple[str, int], list[float]] = defaultdict(list)
        timed: dict[tuple[str, int], dict[str, float]] = {}
        for site in sites:
            x = inputs[site.name]
            threshold = torch.quantile(x[:, 1:].abs().float().flatten()[: 1 << 24], sparsity).reshape(1)
            for batch in batches:
                groups = x[: x.shape[0] // batch * batch, -1].reshape(-1, batch, x.shape[-1])
                masked = (groups.abs() <= threshold).all(1)
                kept[site.role, batch].append(float(masked.float().mean()))
                if site.block == blocks[len(blocks) // 2]:
                    linear = model.get_submodule(site.modules[-1])
                    assert isinstance(linear, nn.Linear)
                    timed[site.role, batch] = time_layer(linear, groups[0].contiguous(), threshold, seconds)
        for (role, batch), shares in kept.items():
            share, times = sum(shares) / len(shares), timed[role, batch]
            rows.append(
                {
                    "site": role,
                    "sparsity": sparsity,
                    "batch": batch,
                    "skipped": share,
                    "independent": sparsity**batch,
                    "microseconds": times["sparse"] * 1e6,
                    "over_torch": times["torch"] / times["sparse"],
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| site | sparsity | batch | skipped | if independent | µs | over torch |", "| --- " + "| ---: " * 6 + "|"]
    lines += [
        f"| {row['site']} | {row['sparsity']:.0%} | {row['batch']} | {row['skipped']:.1%} | {row['independent']:.1%} "
        f"| {row['microseconds']:.1f} | {row['over_torch']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory or hub name")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sparsity", default="0.5,0.7")
    parser.add_argument("--batch", default="1,2,4,8")
    parser.add_argument("--windows", type=int, default=32, help=f"of {WINDOW} tokens each")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=0.4, help="of measuring for each row")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=DTYPES[arguments.dtype]).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = leading_windows(tokenizer, read_text(arguments.text), WINDOW, arguments.windows * WINDOW).to(device)
    batches = [int(value) for value in arguments.batch.split(",")]
    sparsities = [float(value) for value in arguments.sparsity.split(",")]
    rows = measure(model, windows, sparsities, batches, arguments.seconds)
    print(table(rows))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"device": device_name(device), "torch": torch.__version__, "model": Path(arguments.model).name}
        arguments.json.write_text(json.dumps({**result, "dtype": arguments.dtype, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
