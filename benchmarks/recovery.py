# SPDX-License-Identifier: Apache-2.0
"""The table of the README: perplexity of dense, TEAL and SPON on two domains, over allocations and sparsities.

    python -m benchmarks.recovery MODEL --text WIKI.txt --text SPEECHES.txt --test WIKI_TEST.txt --test OTHER.txt

One seed, one protocol (all-but-first), one recipe. Every row is kept as a JSON file in the output directory, so that an
interrupted run goes on where it stopped; the Markdown table is made from these files.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from spon_cli import options
from spon_cli.calibrate import CALIBRATION_TOKENS, Loaded, Settings, calibrated, load
from spon_cli.output import Bar, err, progress_bars
from spon_cli.sources import TextSource, text_sources
from spon_cli.train import train
from spon_plugin import Adapter, SponError
from spon_plugin.adapter import carries_alpha
from spon_plugin.evaluation import evaluate
from spon_plugin.recipe import Recipe, preset
from spon_plugin.sites import linear_inputs
from spon_plugin.statistics import mean_alphas
from spon_plugin.text import leading_windows, mixed_windows, read_text

MEAN_WINDOWS = 16
METHODS = {
    "teal": "TEAL (no alpha)",
    "mean": "mean bias, no training",
    "all": "SPON, alpha on all",
    "down_proj": "SPON, alpha on down_proj",
}


def main(
    model: options.Model,
    test: Annotated[list[Path], typer.Option(help="A text to evaluate on; may repeat.")],
    text: options.Text = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the rows are kept.")] = Path(
        "benchmarks/results/recovery"
    ),
    sparsity: Annotated[str, typer.Option(help="Comma-separated.")] = "0.5,0.6,0.4,0.25",
    allocation: Annotated[str, typer.Option(help="Comma-separated.")] = "uniform,greedy",
    methods: Annotated[str, typer.Option(help="Comma-separated: " + ", ".join(METHODS) + ".")] = ",".join(METHODS),
    windows: Annotated[int | None, typer.Option(help="Training windows.  [default: the preset's]")] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = CALIBRATION_TOKENS,
    window: options.Window = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each test text.")] = 16384,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    offline: Annotated[bool, typer.Option(help="Add Python's language reference to the training texts.")] = True,
) -> None:
    """Measure every row that is not there yet, then write table.md beside the rows."""
    recipe = preset("fast").with_changes(windows=windows)
    sources = text_sources(text, None) if text else []
    sources += text_sources(None, None) if offline else []
    tests = [(path.name, read_text(path)) for path in test]
    loaded = load(model, dtype)
    data = {name: leading_windows(loaded.tokenizer, body, window, max_tokens) for name, body in tests}
    output.mkdir(parents=True, exist_ok=True)
    keep_settings(
        output / "settings" / "settings.json",
        {
            "model": Path(model).name,
            "dtype": dtype,
            "seed": seed,
            "train_texts": [source.name for source in sources],
            "test_texts": list(data),
            "window": window,
            "max_tokens": max_tokens,
            "calibration_tokens": calibration_tokens,
            "recipe": recipe.as_dict(),
        },
    )
    wanted = options.split_names(methods) or []
    for kind in options.split_names(allocation) or []:
        for share in map(float, options.split_names(sparsity) or []):
            settings = Settings(share, kind, window=recipe.window, calibration_tokens=calibration_tokens, seed=seed)
            measure_masks(loaded, sources, settings, recipe, data, wanted, output)
    (output / "table.md").write_text(table(output))
    print((output / "table.md").read_text())


def keep_settings(file: Path, settings: dict[str, Any]) -> None:
    """Write the settings of all rows once, and refuse rows under other settings beside them."""
    if file.is_file():
        kept = json.loads(file.read_text())
        for name, value in settings.items():
            if kept.get(name) != value:
                remedy = "Choose another --output."
                raise SponError.of(name, value, f"{kept.get(name)!r}, as for the rows that are there", remedy)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n")


def measure_masks(
    loaded: Loaded,
    sources: list[TextSource],
    settings: Settings,
    recipe: Recipe,
    data: dict[str, Any],
    methods: list[str],
    output: Path,
) -> None:
    """Calibrate one set of masks, then measure every method on it; write a file per row."""
    files = {m: output / f"{m}-{settings.allocation}-{round(100 * settings.sparsity)}.json" for m in METHODS}
    missing = [method for method in methods if not files[method].is_file()]
    if not missing:
        return
    err.print(f"{settings.allocation}, {settings.sparsity:.0%}: {', '.join(missing)}")
    with progress_bars() as stage:
        masks = calibrated(loaded, sources, settings, stage)
        known: dict[str, dict[str, float]] = {name: _dense(output, name) for name in data}
        for method in METHODS:
            if files[method].is_file():
                row = json.loads(files[method].read_text())
            elif method in missing:
                adapter = with_alphas(loaded, masks, sources, method, settings, recipe, stage)
                row = {
                    "method": method,
                    "allocation": settings.allocation,
                    "sparsity": settings.sparsity,
                    "texts": {
                        name: evaluated(loaded, adapter, windows, known[name], stage(f"{METHODS[method]}: {name}"))
                        for name, windows in data.items()
                    },
                }
                files[method].write_text(json.dumps(row, indent=2) + "\n")
            else:
                continue
            for name, result in row["texts"].items():
                known[name].update({k: v for k, v in result["perplexity"].items() if k != "spon"})


def with_alphas(
    loaded: Loaded,
    masks: Adapter,
    sources: list[TextSource],
    method: str,
    settings: Settings,
    recipe: Recipe,
    stage: Callable[[str], Bar],
) -> Adapter:
    """The masks with the alphas of a method."""
    if method == "teal":
        return masks
    modules: Any = ["down_proj"] if method == "down_proj" else "all"
    fields = replace(masks.fields, alpha_modules=modules)
    if method == "mean":
        windows = mixed_windows(
            loaded.tokenizer, [s.text for s in sources], settings.window, MEAN_WINDOWS, settings.seed
        )
        alphas = mean_alphas(loaded.model, loaded.sites, masks.thresholds, windows, fields.dense_prefix)
        return replace(masks, fields=fields, alphas=alphas)
    inputs = linear_inputs(loaded.model)
    alphas = {path: torch.zeros(inputs[path]) for path in masks.thresholds if carries_alpha(path, modules)}
    with tempfile.TemporaryDirectory() as work:
        start = replace(masks, fields=fields, alphas=alphas)
        return train(loaded, start, sources, recipe, Path(work), settings.seed, False, stage)[0]


def evaluated(loaded: Loaded, adapter: Adapter, windows: Any, known: dict[str, float], bar: Bar) -> dict[str, Any]:
    """One text's figures."""
    result = evaluate(loaded.model, adapter, loaded.sites, windows, progress=bar, known=known)
    return {
        "perplexity": result.perplexity,
        "recovered": result.recovered,
        "achieved": result.sparsity["achieved"],
        "window": result.window,
        "tokens": result.tokens,
    }


def _dense(output: Path, name: str) -> dict[str, float]:
    for file in output.glob("*.json"):
        texts = json.loads(file.read_text())["texts"]
        if name in texts:
            return {"dense": texts[name]["perplexity"]["dense"]}
    return {}


def table(directory: Path) -> str:
    """The rows in `directory` as a Markdown table."""
    rows = [json.loads(file.read_text()) for file in sorted(directory.glob("*.json"))]
    if not rows:
        return ""
    names = list(rows[0]["texts"])
    order = list(METHODS)
    rows.sort(key=lambda row: (row["allocation"] != "uniform", row["sparsity"], order.index(row["method"])))
    head = ["allocation", "sparsity", "method"]
    for name in names:
        dense = rows[0]["texts"][name]["perplexity"]["dense"]
        head += [f"{name} (dense {dense:.2f})", "recovered", "achieved"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * 3 + " ---: |" * (len(head) - 3)]
    for row in rows:
        cells = [row["allocation"], f"{row['sparsity']:.0%}", METHODS[row["method"]]]
        for name in names:
            result = row["texts"][name]
            perplexity = result["perplexity"].get("spon", result["perplexity"]["teal"])
            recovered = "" if result["recovered"] is None else f"{result['recovered']:.2f}"
            cells += [f"{perplexity:.2f}", recovered, f"{result['achieved']:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
