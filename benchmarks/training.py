# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of training alphas, and what of a step is matrix products, beside another checkout in one run.

    python -m benchmarks.training MODEL --adapter ADAPTER
    python -m benchmarks.training MODEL --adapter ADAPTER --against ../before --batch-size 2 --window 256 --json FILE

A step is that of `spon train`: the dense model's pass, the sparse model's, the divergence over the vocabulary, and
backward. ``products`` is the share of a profiled step that torch spends inside of its matrix products, which no other
way of masking can take less time for; ``limit`` is what the speed would be if a step were nothing but them. Checkouts
take turns, each in processes of its own, and memory is the largest that such a process held.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmv_")
WARM_UP = 2


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Train for some steps with the packages that are imported here; seconds a step, and the share of products."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from spon_plugin import read_adapter
    from spon_plugin.adapter.mask import with_alphas
    from spon_plugin.calibration.text import mixed_windows, offline_text
    from spon_plugin.machine import DTYPES

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=DTYPES[arguments.dtype])
    adapter = read_adapter(arguments.adapter)
    zeros = {path: torch.zeros(model.get_submodule(path).in_features) for path in adapter.masks}
    adapter.masks = with_alphas(adapter.masks, zeros)
    count = (arguments.steps + WARM_UP) * arguments.batch_size
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = mixed_windows(tokenizer, [offline_text()], arguments.window, count)

    ends = _train(model, adapter, windows, arguments.batch_size)
    seconds = statistics.median(b - a for a, b in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _train(model, adapter, windows[: 2 * arguments.batch_size], arguments.batch_size)
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    products = sum(spent.get(name, 0) for name in PRODUCTS) / sum(spent.values())
    return {"seconds": seconds, "products": products, "memory": memory}


def _train(model: Any, adapter: Any, windows: torch.Tensor, batch_size: int) -> list[float]:
    """When each step ended."""
    from spon_peft.training import train_adapter
    from spon_plugin.training.recipe import Recipe

    recipe = Recipe(len(windows), windows.shape[1], batch_size, epochs=1, learning_rate=0.015)
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as work:
        train_adapter(
            model, adapter, windows, recipe, Path(work) / "work", save_every=10**9,
            progress=lambda *_: ends.append(time.perf_counter()),
        )  # fmt: skip
    return ends


def in_checkout(checkout: Path) -> dict[str, float]:
    """`measure` in a process that imports the packages of a checkout."""
    # Not at the top: a process of another checkout would look for it there.
    from benchmarks.checkouts import environment

    command = [sys.executable, __file__, *sys.argv[1:], "--measure"]
    done = subprocess.run(command, env=environment(checkout), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("model", help="a directory that transformers loads")
    own.add_argument("--adapter", required=True, help="whose masks are used; alphas begin at zero")
    own.add_argument("--against", type=Path, action="append", default=[], help="another checkout; may repeat")
    own.add_argument("--batch-size", type=int, default=2)
    own.add_argument("--window", type=int, default=256)
    own.add_argument("--steps", type=int, default=6, help="that are timed, in a round")
    own.add_argument("--rounds", type=int, default=2)
    own.add_argument("--dtype", default="float32")
    own.add_argument("--json", type=Path, help="where to write the figures")
    own.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    return own


def main() -> None:
    """Run the command line."""
    arguments = parser().parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    from benchmarks.checkouts import checkouts
    from spon_plugin.machine import device_name

    trees = checkouts(arguments.against)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for number in range(arguments.rounds):
        for name, checkout in trees.items():
            rounds[name].append(in_checkout(checkout))
            print(
                f"round {number + 1}, {name}: {rounds[name][-1]['seconds']:.2f} s a step", file=sys.stderr, flush=True
            )
    tokens, rows = arguments.batch_size * arguments.window, {}
    for name, measured in rounds.items():
        seconds, products, memory = (
            statistics.median(row[key] for row in measured) for key in ("seconds", "products", "memory")
        )
        rows[name] = {
            "tokens_per_second": tokens / seconds,
            "products": products,
            "limit": tokens / seconds / products,
            "memory": memory,
        }
    device = device_name(torch.device("cpu"))
    print(f"{device}; {arguments.batch_size} x {arguments.window} tokens a step, {arguments.dtype}\n")
    print("| checkout | tokens/s | of which products | limit, tokens/s | memory, GB |\n|---|---|---|---|---|")
    for name, row in rows.items():
        speed = f"{row['tokens_per_second']:.1f} | {row['products']:.0%} | {row['limit']:.1f}"
        print(f"| {name} | {speed} | {row['memory'] / 1e9:.2f} |")
    if arguments.json:
        settings = {key: getattr(arguments, key) for key in ("batch_size", "window", "steps", "rounds", "dtype")}
        result = {"device": device, "torch": torch.__version__, **settings, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
