# SPDX-License-Identifier: Apache-2.0
"""`spon compare`: sparsification methods side by side, with and without alpha."""

from __future__ import annotations

import json as json_module
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from spon_cli import options
from spon_cli.command import Between, command
from spon_cli.duration import READ, announce, announce_time, calibration_passes, training_passes
from spon_cli.loading import Loaded
from spon_cli.output import note, show_json, show_table
from spon_cli.plots import figure
from spon_cli.progress import row_bars
from spon_plugin import SponError
from spon_plugin.calibration.text import windows_digest
from spon_plugin.decoder.sites import target_names
from spon_plugin.sparsifiers import SPARSIFIERS, get_sparsifier, method_names
from spon_plugin.sparsifiers.registry import plain_name
from spon_plugin.studies.comparison import DENSE, MEAN, OFF, ON, QUICK, Comparison, Key, by_key, keys
from spon_plugin.studies.comparison_tables import (
    SHARES,
    alpha_title,
    cells,
    markdown,
    mean,
    quality_columns,
    quality_line,
    records,
)
from spon_plugin.studies.quality_tables import NOTES as QUALITY_NOTES
from spon_plugin.studies.rows import SETTINGS, RowStore
from spon_plugin.studies.tables import csv_text, json_text, number
from spon_plugin.training.recipe import Recipe
from spon_transformers.text_sources import TextSource

DEFAULT_METHODS = [name for name in SPARSIFIERS if name != "teal-greedy"]
MAX_TOKENS = 6144
HIGHEST = 6  # times the dense perplexity, at the top of the plot


@dataclass(frozen=True, kw_only=True)
class CompareOptions(options.StudyOptions, options.LastWordOptions):
    """Options of `spon compare`."""

    methods: Annotated[str, typer.Option(help="Comma-separated: " + ", ".join(SPARSIFIERS) + ".")] = ",".join(
        DEFAULT_METHODS
    )
    sparsity: Annotated[str, typer.Option(help="Comma-separated shares.")] = "0.25,0.4,0.5,0.6"
    alpha: Annotated[
        str, typer.Option(help="Comma-separated: off, mean (a bias, untrained), on, or linears such as down_proj.")
    ] = "off,mean,on"
    target_modules: options.Targets = None
    windows: Annotated[int, typer.Option(help="Training windows per row."), Between(1, options.MANY)] = QUICK.windows
    epochs: Annotated[int, typer.Option(help="Passes over them."), Between(1, options.MANY)] = QUICK.epochs
    learning_rate: Annotated[
        float, typer.Option(help="Highest rate, relative to thresholds; sensitivity takes a third of it.")
    ] = QUICK.learning_rate
    max_tokens: options.TestTokens = MAX_TOKENS

    def keys(self) -> list[Key]:
        """The rows that the user asked for."""
        return keys(
            options.split_names(self.methods) or [],
            options.split_numbers("sparsity", self.sparsity),
            options.split_names(self.alpha) or [],
        )

    def recipe(self) -> Recipe:
        """The schedule of every trained row."""
        return QUICK.with_changes(windows=self.windows, epochs=self.epochs, learning_rate=self.learning_rate)


@command
def compare_command(given: CompareOptions) -> None:
    """Compare sparsification methods at several sparsities, each with and without alpha: table 1 of the paper.

    One protocol and one seed for all rows. Each row is kept in OUTPUT as soon as it is measured; the same command goes
    on where it stopped, and more methods or sparsities may be added. Without --text and --test, four fifths of Python's
    language reference are trained on and the rest is evaluated on.

    [dim]spon compare ./model -o compare --text wiki.txt --text speeches.txt --test wiki.test.txt[/dim]

    [dim]spon compare ./model -o compare --methods teal,wina,wanda --sparsity 0.5,0.6 --alpha off,on[/dim]

    [dim]spon compare ./model -o teal --methods teal,teal-greedy --alpha off,mean,on,down_proj --windows 300[/dim]
    """
    wanted, recipe = given.keys(), given.recipe()
    given.check(recipe)
    announce(f"This measures {len(wanted) + 1} rows, less those that {given.output} has")
    sources, tests, last_words = given.sources("train"), given.tests(), given.last_word_texts()
    loaded = given.load(options.split_names(given.target_modules))
    calibration, training = _windows(loaded, sources, given, recipe)
    evaluated = given.test_windows(loaded, tests)
    settings = {
        **given.common(loaded, evaluated, recipe),
        **given.last_word_settings(last_words),
        "target_modules": target_names(loaded.sites, loaded.model),
        "texts": [source.name for source in sources],
        "training_windows": windows_digest(training),
        "calibration_windows": windows_digest(calibration),
    }
    bench = Comparison(
        model=loaded.model, sites=loaded.sites, tests=evaluated, protocol=given.protocol, seed=given.seed,
        calibration=calibration, training=training, recipe=recipe, passages=loaded.encoded(last_words),
    )  # fmt: skip
    bench.check(wanted)
    store = RowStore(given.output, settings)
    new = [key for key in wanted if not store.has(key.name)]
    read = sum(windows.numel() for windows in evaluated.values()) + sum(len(each.ids) for each in bench.passages)
    announce_time(loaded.model, _passes(new, given, recipe, read))
    with row_bars(len(wanted) + 1, _line) as (bench.stage, bench.done):
        bench.run(wanted, store)
    rows = store.all()  # with the rows of earlier runs
    rows.sort(key=_order)
    write_tables(rows, given.output)
    if given.json:
        show_json(as_json(rows, given.output))
        return
    show(rows)
    note(f"Tables and plot written to {given.output}")


def _windows(
    loaded: Loaded, sources: Sequence[TextSource], given: CompareOptions, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Windows to calibrate on, and to train on."""
    count = given.calibration_tokens // recipe.window
    calibration = loaded.mixed_windows(sources, recipe.window, count, given.seed)
    if len(calibration) < count:
        expected = f"at most {calibration.numel()}, all of the text"
        raise SponError.of("calibration_tokens", given.calibration_tokens, expected)
    return calibration, loaded.mixed_windows(sources, recipe.window, recipe.windows, given.seed)


def _passes(new: Sequence[Key], given: CompareOptions, recipe: Recipe, read: int) -> int:
    """Passes of tokens through the model that these rows take, each of which is evaluated on `read` tokens."""
    methods = {key.method for key in new}
    trained = sum(key.alpha not in (OFF, MEAN) for key in new)
    return (
        sum(calibration_passes(method, given.calibration_tokens) for method in methods)
        + trained * training_passes(recipe)
        + READ * len(new) * read
    )


def write_tables(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Write table.md, table.csv, table.json and plot.png into `output`."""
    (output / "table.md").write_text(markdown(rows), encoding="utf-8")
    (output / "table.csv").write_text(csv_text(records(rows)), encoding="utf-8")
    (output / "table.json").write_text(json_text(as_json(rows, output)), encoding="utf-8")
    plot(rows, output / "plot.png")


def as_json(rows: Sequence[dict[str, Any]], output: Path) -> dict[str, Any]:
    """Settings and rows as one object."""
    dense = next(row for row in rows if row["method"] == DENSE)
    return {
        "settings": json_module.loads((output / SETTINGS).read_text(encoding="utf-8")),
        "dense": {name: result["perplexity"] for name, result in dense["texts"].items()},
        "rows": records(rows),
        "skipped": [row for row in rows if "skipped" in row],
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    dense = next(row for row in rows if row["method"] == DENSE)
    names = list(dense["texts"])
    columns = ["sparsity", "method", "alpha"]
    for name in names:
        columns += [f"{name}\ndense {number(dense['texts'][name]['perplexity'])}", *SHARES]
    columns += ["masked", "bytes saved", "extra kB", "calib. s", "train s"]
    ordered = sorted(by_key(rows), key=lambda item: item[0].sparsity)
    show_table("Perplexity", columns, [cells(key, row, rows, names) for key, row in ordered])
    lines = [quality_line(key, row, names) for key, row in ordered]
    show_table("Beside the dense model", quality_columns(rows), lines, caption=QUALITY_NOTES)
    for row in (row for row in rows if "skipped" in row):
        note(f"no row for {row['method']} at {row['sparsity']:.0%}, alpha {row['alpha']}: {row['skipped']}")


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Perplexity against the share of weight bytes saved: one line per method and alpha, one panel per text.

    Rows above `HIGHEST` are in the table only.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import ScalarFormatter

    dense = next(row for row in rows if row["method"] == DENSE)
    names = list(dense["texts"])
    methods = list(dict.fromkeys(key.method for key, _ in by_key(rows)))
    alphas = [a for a in dict.fromkeys(key.alpha for key, _ in by_key(rows)) if a != MEAN]
    styles = {OFF: (":", "o"), **{a: ("-", "s^Dv"[i % 4]) for i, a in enumerate(x for x in alphas if x != OFF)}}
    with figure(file, len(names), width=8, height=6) as panels:
        for axes, name in zip(panels, names, strict=True):
            lowest = dense["texts"][name]["perplexity"]
            if lowest is None:  # no scale without the dense model's
                continue
            for index, method in enumerate(methods):
                for alpha in alphas:
                    points = sorted(
                        (row["texts"][name]["saved"], row["texts"][name]["perplexity"])
                        for key, row in by_key(rows)
                        if (key.method, key.alpha) == (method, alpha)
                        and (row["texts"][name]["perplexity"] or math.inf) < HIGHEST * lowest
                    )
                    if points:
                        line, marker = styles[alpha]
                        label = f"{get_sparsifier(method).title}, alpha {alpha_title(alpha)}"
                        color = colormaps["tab20"](2 * index % 20 + (index >= 10))  # ten dark colours, then the light
                        axes.plot(*zip(*points, strict=True), line, marker=marker, color=color, label=label, ms=4)
            axes.axhline(lowest, color="0.6", linewidth=1, label="dense")
            axes.set(
                title=name, xlabel="share of the linears' weight bytes not read", ylabel="perplexity", yscale="log"
            )
            # Static methods may be a hundred times worse than the others; they would press these into one line.
            axes.set_ylim(0.97 * lowest, min(axes.get_ylim()[1], HIGHEST * lowest))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
        panels[0].figure.legend(*panels[-1].get_legend_handles_labels(), fontsize=7, loc="outside right upper")


def _line(row: dict[str, Any]) -> str:
    if row["method"] == DENSE:
        return f"{DENSE}: {_perplexities(row)}"
    label = f"{row['method']} {row['sparsity']:.0%}, alpha {row['alpha']}"
    if "skipped" in row:
        return f"{label}: no row. {row['skipped']}"
    saved = mean(result["saved"] for result in row["texts"].values())
    return f"{label}: {_perplexities(row)}, {saved:.1%} saved, {sum(row['seconds'].values()):.0f} s"


def _perplexities(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number(result['perplexity'])}" for name, result in row["texts"].items())


def _order(row: dict[str, Any]) -> tuple[int, str, float, int, str]:
    if row["method"] == DENSE:
        return (-1, "", 0.0, 0, "")
    key = Key(row["method"], row["sparsity"], row["alpha"])
    return (
        method_names().index(plain_name(key.method)),
        key.method,
        key.sparsity,
        (OFF, MEAN, ON, key.alpha).index(key.alpha),
        key.alpha,
    )
