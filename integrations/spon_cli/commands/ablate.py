# SPDX-License-Identifier: Apache-2.0
"""`spon ablate`: vary one thing at a time."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from spon_cli import options, precision
from spon_cli.loading import load
from spon_cli.output import note, row_bars, show_json, show_table
from spon_cli.study_plots import plot_study
from spon_plugin import Adapter, SponError, read_adapter
from spon_plugin.calibration.text import leading_windows, mixed_windows, windows_digest
from spon_plugin.decoder.sites import linear_inputs
from spon_plugin.files import check_new
from spon_plugin.masking import check_sparsity
from spon_plugin.sparsifiers import SPARSIFIERS, get_sparsifier
from spon_plugin.studies.ablation import DENSE, Ablation, Pools, Trial, describe, plan
from spon_plugin.studies.evaluation import PROTOCOLS
from spon_plugin.studies.plan import BASE, STUDIES, Setup
from spon_plugin.studies.plan_tables import cells, columns, markdown, records
from spon_plugin.studies.rows import RowStore, weights_digest
from spon_plugin.studies.tables import csv_text, number
from spon_plugin.training.recipe import Recipe
from spon_transformers.text_sources import TextSource, text_sources

PRECISION = "precision"
NAMES = (*STUDIES, PRECISION)
CALIBRATION_TOKENS, MAX_TOKENS = 8192, 4096


def ablate_command(
    model: options.Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where rows and tables are kept; may be resumed.")],
    study: Annotated[str, typer.Option(help="Comma-separated: " + ", ".join(NAMES) + ".")] = "location,halves",
    text: options.Text = None,
    dataset: options.Dataset = None,
    test: Annotated[list[Path] | None, typer.Option(help="A text to evaluate on; may repeat.")] = None,
    sparsity: options.Sparsity = 0.5,
    method: Annotated[str, typer.Option(help="One of " + ", ".join(SPARSIFIERS) + ".")] = "teal",
    windows: Annotated[int, typer.Option(help="Training windows of a row.")] = BASE.windows,
    learning_rate: Annotated[float, typer.Option(help="Highest rate, relative to thresholds.")] = BASE.learning_rate,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = CALIBRATION_TOKENS,
    precisions: Annotated[
        str, typer.Option(help="For the study precision, the full one first.")
    ] = "float32,bfloat16,int8,int4",
    adapter: Annotated[
        Path | None, typer.Option(help="For the study precision: in place of training on the full-precision base.")
    ] = None,
    window: options.Window = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each test text.")] = MAX_TOKENS,
    protocol: Annotated[str, typer.Option(help=" or ".join(PROTOCOLS) + "; as in spon eval.")] = PROTOCOLS[0],
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Vary one thing at a time: the ablations of the paper (figures 4 and 5), for any model.

    location: where alpha is. layer: one decoder block at a time. halves: the first or the last half of them. tokens: to
    calibrate and to train on. rate: the learning rate. domain: each --text alone and all together, on every --test.
    generalization: that, mixes without one text, fewer sites, other windows, weight decay. sparsity: 70 to 90%.
    precision: quantized bases, with the adapter of the full-precision base and with their own.

    Each row is kept in OUTPUT as soon as it is measured and serves every study; the same command goes on where it
    stopped, and studies may be added. Without --text and --test, four fifths of Python's language reference are trained
    on and the rest is evaluated on.

    [dim]spon ablate ./model -o ablate --study location,halves --text wiki.txt --text speeches.txt --test test.txt[/dim]

    [dim]spon ablate ./model -o ablate --study domain --text wiki.txt --text code.txt --test a.txt --test b.txt[/dim]

    [dim]spon ablate ./model -o quantized --study precision --precisions float32,int8,int4 --adapter spon50[/dim]
    """
    names = options.split_names(study) or []
    if not names:
        raise SponError.of("study", study, "one of " + ", ".join(NAMES))
    for name in names:
        options.check_choice("study", name, NAMES)
    options.check_choice("protocol", protocol, PROTOCOLS)
    check_sparsity(sparsity)
    get_sparsifier(method)
    recipe = BASE.with_changes(windows=windows, learning_rate=learning_rate)
    if calibration_tokens < recipe.window:
        raise SponError.of("calibration_tokens", calibration_tokens, f"at least {recipe.window}, one window")
    levels = options.split_names(precisions) or []
    start = None if adapter is None else read_adapter(adapter)
    if PRECISION in names:
        precision.check_precisions(levels)
        if method != "teal":
            raise SponError.of("method", method, "teal, for the study precision")
    if not output.is_dir():
        check_new(output)
    sources = text_sources(text, dataset, part="train")
    held_out = text_sources(test, None, part="test")
    loaded = load(model, dtype)
    if start is not None:
        precision.check_adapter(start, linear_inputs(loaded.model), model, sparsity)
    setup = Setup(loaded.sites, tuple(s.name for s in sources), sparsity, calibration_tokens, recipe)
    studies = [STUDIES[name](setup) for name in names if name != PRECISION]
    tests = {s.name: leading_windows(loaded.tokenizer, s.text, window, max_tokens) for s in held_out}
    trials = [point.trial for found in studies for point in found.points]
    pools = _pools(loaded.tokenizer, sources, [*trials, setup.trial], setup, seed)
    settings = {
        "model": Path(model).name,
        "weights": weights_digest(loaded.model),
        "method": method,
        "dtype": dtype,
        "seed": seed,
        "protocol": protocol,
        "window": window,
        "tests": {name: windows_digest(rows) for name, rows in tests.items()},
        "training": windows_digest(pools[setup.texts, recipe.window]),
        "recipe": recipe.as_dict(),
        "calibration_tokens": calibration_tokens,
    }
    bench = Ablation(loaded.model, loaded.sites, pools, recipe.window, tests, method, protocol, seed)
    bench.check(plan([*trials, setup.trial]))
    store = RowStore(output, settings)
    total = (len(plan(trials)) + 1 if trials else 0) + (2 * len(levels) - 1 if PRECISION in names else 0)
    report: dict[str, Any] = {"settings": settings}
    with row_bars(total, _line) as (bench.stage, bench.done):
        rows = bench.run(trials, store) if trials else {}
        for found in studies:
            report[found.name] = records(found, rows)
            _write(output, found.name, markdown(found, rows), report[found.name])
            plot_study(found, rows, output / f"{found.name}.png")
        quantized: list[dict[str, Any]] = []
        if PRECISION in names:
            del loaded.model, bench.model  # one model in memory at a time
            quantized = _precision(model, levels, setup, pools, bench, store, start, output)
            report[PRECISION] = precision.records(quantized)
    if json:
        show_json(report)
        return
    for found in studies:
        show_table(found.title, columns(found, rows), [cells(point, rows) for point in found.points])
    if quantized:
        show_table("Quantized bases", *precision.table(quantized))
    note(f"Tables and plots written to {output}")


def _precision(
    model: str,
    levels: Sequence[str],
    setup: Setup,
    pools: Pools,
    bench: Ablation,
    store: RowStore,
    adapter: Adapter | None,
    output: Path,
) -> list[dict[str, Any]]:
    """Run the study of quantized bases and write its tables and plot."""
    pool = pools[setup.texts, setup.recipe.window]
    study = precision.PrecisionStudy(
        model, levels, setup.trial, pool, bench.tests, bench.protocol, bench.seed, adapter, output, bench.stage,
        bench.done,
    )  # fmt: skip
    rows = study.run(store)
    _write(output, PRECISION, precision.markdown(rows), precision.records(rows))
    precision.plot(rows, output / f"{PRECISION}.png")
    return rows


def _pools(tokenizer: Any, sources: Sequence[TextSource], trials: Sequence[Trial], setup: Setup, seed: int) -> Pools:
    """The windows of every mix of texts and every length that a trial takes from, as many tokens of each."""
    texts = {source.name: source.text for source in sources}
    base = setup.recipe.window
    wanted = dict.fromkeys(
        (trial.texts, window)
        for trial in trials
        for window in ([base] if trial.recipe is None else [base, trial.recipe.window])
    )
    return {
        (mix, window): mixed_windows(
            tokenizer, [texts[name] for name in mix], window, setup.pool * base // window, seed
        )
        for mix, window in wanted
    }


def _write(output: Path, name: str, table: str, flat: Sequence[dict[str, Any]]) -> None:
    (output / f"{name}.md").write_text(table, encoding="utf-8")
    (output / f"{name}.csv").write_text(csv_text(flat), encoding="utf-8")
    (output / f"{name}.json").write_text(json_module.dumps(list(flat), indent=2) + "\n", encoding="utf-8")


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
    recipe = None if row["recipe"] is None else Recipe(**row["recipe"])
    trial = Trial(row["sparsity"], tuple(row["texts"]), row["calibration_tokens"], tuple(row["carriers"]), recipe)
    return f"{describe(trial)}: {tests} ({sum(row['seconds'].values()):.0f} s)"
