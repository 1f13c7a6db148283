# SPDX-License-Identifier: Apache-2.0
"""`spon ablate`: vary one thing at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from spon_cli import options
from spon_cli.command import Between, command
from spon_cli.duration import COMPARED, READ, announce, announce_time, calibration_passes, training_passes
from spon_cli.loading import Loaded, base_name
from spon_cli.output import note, show_json, show_table
from spon_cli.progress import row_bars
from spon_cli.study_plots import plot_precisions, plot_study
from spon_plugin import Adapter, SponError, read_adapter
from spon_plugin.adapter.base import base_digest
from spon_plugin.calibration.text import windows_digest
from spon_plugin.decoder.sites import linear_inputs
from spon_plugin.masking import check_sparsity
from spon_plugin.sparsifiers import SPARSIFIERS, get_sparsifier
from spon_plugin.studies import quantized_bases
from spon_plugin.studies.ablation import DENSE, Ablation, Pools, Trial, describe, plan
from spon_plugin.studies.plan import BASE, STUDIES, Setup
from spon_plugin.studies.plan_tables import cells, columns, markdown, records
from spon_plugin.studies.rows import RowStore
from spon_plugin.studies.tables import csv_text, json_text, number
from spon_plugin.training.recipe import Recipe
from spon_transformers.precision import check_precisions, load_precision, weight_bytes
from spon_transformers.text_sources import TextSource

PRECISION = "precision"
NAMES = (*STUDIES, PRECISION)


@dataclass(frozen=True, kw_only=True)
class AblateOptions(options.StudyOptions):
    """Options of `spon ablate`."""

    study: Annotated[str, typer.Option(help="Comma-separated: " + ", ".join(NAMES) + ".")] = "location,halves"
    sparsity: options.Sparsity = 0.5
    method: Annotated[str, typer.Option(help="One of " + ", ".join(SPARSIFIERS) + ".")] = "teal"
    windows: Annotated[int, typer.Option(help="Training windows of a row."), Between(1, options.MANY)] = BASE.windows
    train_window: Annotated[
        int, typer.Option(help="Tokens per window to calibrate and train on."), Between(2, options.MANY)
    ] = BASE.window
    learning_rate: Annotated[float, typer.Option(help="Highest rate, relative to thresholds.")] = BASE.learning_rate
    precisions: Annotated[str, typer.Option(help="For the study precision, the full one first.")] = (
        "float32,bfloat16,int8,int4"
    )
    adapter: Annotated[
        Path | None, typer.Option(help="For the study precision: in place of training on the full-precision base.")
    ] = None

    @property
    def names(self) -> list[str]:
        """Of the studies."""
        return options.split_names(self.study) or []

    @property
    def levels(self) -> list[str]:
        """The precisions."""
        return options.split_names(self.precisions) or []

    def recipe(self) -> Recipe:
        """The schedule that the studies vary from."""
        return BASE.with_changes(windows=self.windows, window=self.train_window, learning_rate=self.learning_rate)

    def check(self, recipe: Recipe) -> None:
        """Raise `SponError` for what can be told without texts and model."""
        if not self.names:
            raise SponError.of("study", self.study, "one of " + ", ".join(NAMES))
        for name in self.names:
            options.check_choice("study", name, NAMES)
        check_sparsity(self.sparsity)
        get_sparsifier(self.method)
        if PRECISION in self.names:
            check_precisions(self.levels)
            if self.method != "teal":
                raise SponError.of("method", self.method, "teal, for the study precision")
        super().check(recipe)


@command
def ablate_command(given: AblateOptions) -> None:
    """Vary one thing at a time: the ablations of the paper (figures 4 and 5), for any model.

    location: where alpha is. layer: one decoder block at a time. halves: the first or the last half of them. tokens: to
    calibrate and to train on. rate: the learning rate. domain: each --text alone and all together, on every --test.
    generalization: that, mixes without one text, fewer sites, other windows, weight decay. sparsity: 70 to 90%.
    prefix: position 0 masked or dense, matched. loss: top-k, temperature, hidden states, tokens by entropy, matched;
    for windows of 512, --train-window 512. precision: quantized bases, with the adapter of the full-precision base
    and with their own.

    Each row is kept in OUTPUT as soon as it is measured and serves every study; the same command goes on where it
    stopped, and studies may be added. Without --text and --test, four fifths of Python's language reference are trained
    on and the rest is evaluated on.

    [dim]spon ablate ./model -o ablate --study location,halves --text wiki.txt --text speeches.txt --test test.txt[/dim]

    [dim]spon ablate ./model -o ablate --study domain --text wiki.txt --text code.txt --test a.txt --test b.txt[/dim]

    [dim]spon ablate ./model -o quantized --study precision --precisions float32,int8,int4 --adapter spon50[/dim]
    """
    recipe = given.recipe()
    given.check(recipe)
    method = get_sparsifier(given.method).name
    start = None if given.adapter is None else read_adapter(given.adapter)
    announce(f"This varies {', '.join(given.names)}; rows that {given.output} has are not measured again")
    sources, held_out = given.sources("train"), given.tests()
    loaded = given.load()
    if start is not None:
        inputs, digest = linear_inputs(loaded.model), base_digest(loaded.model)
        quantized_bases.check_adapter(start, inputs, given.model, given.sparsity, digest)
    setup = Setup(
        loaded.sites, tuple(source.name for source in sources), given.sparsity, given.calibration_tokens, recipe
    )
    studies = [STUDIES[name](setup) for name in given.names if name != PRECISION]
    tests = given.test_windows(loaded, held_out)
    trials = [point.trial for found in studies for point in found.points]
    pools = _pools(loaded, sources, [*trials, setup.trial], setup, given.seed)
    settings = {
        **given.common(loaded, tests, recipe),
        "method": method,
        "training": windows_digest(pools[setup.texts, recipe.window]),
        "calibration_tokens": given.calibration_tokens,
    }
    bench = Ablation(
        model=loaded.model, sites=loaded.sites, tests=tests, protocol=given.protocol, seed=given.seed, pools=pools,
        window=recipe.window, method=method,
    )  # fmt: skip
    bench.check(plan([*trials, setup.trial]))
    store = RowStore(given.output, settings)
    total = (len(plan(trials)) + 1 if trials else 0) + (2 * len(given.levels) - 1 if PRECISION in given.names else 0)
    read = sum(windows.numel() for windows in tests.values())
    new = [trial for trial in plan(trials) if not store.has(trial.name)]
    quantizing = PRECISION in given.names
    announce_time(loaded.model, _passes(new, given.method, read) + quantizing * _quantized_passes(given, recipe, read))
    with row_bars(total, _line) as (bench.stage, bench.done):
        rows = bench.run(trials, store) if trials else {}
        for found in studies:
            _write(given.output, found.name, markdown(found, rows), records(found, rows))
            plot_study(found, rows, given.output / f"{found.name}.png")
        quantized: list[dict[str, Any]] = []
        if PRECISION in given.names:
            del loaded.model, bench.model  # one model in memory at a time
            quantized = _precision(given, setup, bench, store, start)
    if given.json:
        flat = {found.name: records(found, rows) for found in studies}
        show_json(
            {"settings": settings, **flat, **({PRECISION: quantized_bases.records(quantized)} if quantized else {})}
        )
        return
    for found in studies:
        show_table(found.title, columns(found, rows), [cells(point, rows) for point in found.points])
    if quantized:
        show_table("Quantized bases", *quantized_bases.table(quantized))
    note(f"Tables and plots written to {given.output}")


def _passes(trials: Sequence[Trial], method: str, read: int) -> int:
    """Passes of tokens through the model that these rows take, each of which is evaluated on `read` tokens."""
    calibrated = {(trial.texts, trial.calibration_tokens) for trial in trials}
    calibrating = sum(calibration_passes(method, tokens) for _, tokens in calibrated)
    trained = sum(training_passes(trial.recipe) for trial in trials if trial.recipe is not None)
    return calibrating + trained + READ * len(trials) * read


def _quantized_passes(given: AblateOptions, recipe: Recipe, read: int) -> int:
    """The same of the study of quantized bases: adapters of their own and of the full-precision base."""
    own = len(given.levels) - (given.adapter is not None)
    evaluated = COMPARED * (2 * len(given.levels) - 1) * read
    return own * (calibration_passes(given.method, given.calibration_tokens) + training_passes(recipe)) + evaluated


def _precision(
    given: AblateOptions, setup: Setup, bench: Ablation, store: RowStore, adapter: Adapter | None
) -> list[dict[str, Any]]:
    """Run the study of quantized bases and write its tables and plot."""
    pool = bench.pools[setup.texts, setup.recipe.window]
    study = quantized_bases.QuantizedBases(
        load=lambda level: load_precision(given.model, level, given.levels[0], given.trust_remote_code),
        weight_bytes=weight_bytes,
        precisions=given.levels, trial=setup.trial, pool=pool, tests=bench.tests, directory=given.output,
        adapter=adapter, base_model=base_name(given.model),
        protocol=bench.protocol, seed=bench.seed, stage=bench.stage, done=bench.done,
    )  # fmt: skip
    rows = study.run(store)
    _write(given.output, PRECISION, quantized_bases.markdown(rows), quantized_bases.records(rows))
    plot_precisions(rows, given.output / f"{PRECISION}.png")
    return rows


def _pools(loaded: Loaded, sources: Sequence[TextSource], trials: Sequence[Trial], setup: Setup, seed: int) -> Pools:
    """The windows of every mix of texts and every length that a trial takes from, as many tokens of each."""
    named = {source.name: source for source in sources}
    base = setup.recipe.window
    wanted = dict.fromkeys(
        (trial.texts, window)
        for trial in trials
        for window in ([base] if trial.recipe is None else [base, trial.recipe.window])
    )
    return {
        (mix, window): loaded.mixed_windows([named[name] for name in mix], window, setup.pool * base // window, seed)
        for mix, window in wanted
    }


def _write(output: Path, name: str, table: str, flat: Sequence[dict[str, Any]]) -> None:
    (output / f"{name}.md").write_text(table, encoding="utf-8")
    (output / f"{name}.csv").write_text(csv_text(flat), encoding="utf-8")
    (output / f"{name}.json").write_text(json_text(list(flat)), encoding="utf-8")


def _line(row: dict[str, Any]) -> str:
    """A row that was just measured, in words."""
    if "precision" in row:
        tests = ", ".join(
            f"{name} dense {number(result['dense'])}, TEAL {number(result['teal'])}, SPON {number(result['spon'])}"
            for name, result in row["tests"].items()
        )
        return f"{row['precision']}, {row['adapter']} adapter: {tests}"
    tests = ", ".join(f"{name} {number(result['perplexity'])}" for name, result in row["tests"].items())
    if row["name"] == DENSE:
        return f"{DENSE}: {tests}"
    return f"{describe(Trial.of(row))}: {tests} ({sum(row['seconds'].values()):.0f} s)"
