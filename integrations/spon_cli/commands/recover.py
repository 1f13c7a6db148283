# SPDX-License-Identifier: Apache-2.0
"""`spon recover`: how much of uniform TEAL's gap comes back, by every step that is known to help."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from spon_cli import options
from spon_cli.command import Between, command
from spon_cli.duration import announce
from spon_cli.loading import base_name
from spon_cli.output import note, show_json, show_table
from spon_cli.progress import row_bars
from spon_cli.study_plots import plot_recovery
from spon_plugin import SponError
from spon_plugin.calibration.text import windows_digest
from spon_plugin.masking import check_sparsity
from spon_plugin.sparsifiers.registry import adapter_sparsifier
from spon_plugin.studies.ablation import DENSE
from spon_plugin.studies.recovery import Recovery
from spon_plugin.studies.recovery_plan import SENSITIVITY, UNIFORM, Row, rows
from spon_plugin.studies.recovery_tables import columns, lines, markdown, records
from spon_plugin.studies.rows import SETTINGS, RowStore
from spon_plugin.studies.tables import csv_text, json_text, number
from spon_plugin.training.recipe import PRESETS

SHORT = 128
"""Tokens of the short windows that every row is evaluated on beside those of ``--window``: the paper's."""


@dataclass(frozen=True, kw_only=True)
class RecoverOptions(options.StudyOptions):
    """Options of `spon recover`."""

    sparsity: Annotated[str, typer.Option(help="Comma-separated targets; variants are tried at the first.")] = "0.5,0.6"
    train_steps: Annotated[int, typer.Option(help="Steps of the common schedule."), Between(1, options.MANY)] = 300
    batch_size: Annotated[int, typer.Option(help="Windows per step."), Between(1, options.MANY)] = 8
    train_window: Annotated[int, typer.Option(help="Tokens per training window."), Between(2, options.MANY)] = 512
    seeds: Annotated[int, typer.Option(help="Seeds of what claims rest on."), Between(1, options.MANY)] = 3
    method: Annotated[str, typer.Option(help="Of the masks that are not uniform TEAL's.")] = SENSITIVITY
    only: Annotated[str | None, typer.Option(help="Comma-separated: rows whose label begins so, in this order.")] = None
    against: Annotated[
        Path | None,
        typer.Option(help="OUTPUT of another run: shares are of its TEAL's gap, such as before `spon rotate`."),
    ] = None
    workers: Annotated[
        int,
        typer.Option(help="Processes that measure rows at once; 0 writes the tables of what is there."),
        Between(0, 64),
    ] = 1

    def rows(self) -> list[Row]:
        """What is to be measured."""
        targets = [check_sparsity(value) for value in options.split_numbers("sparsity", self.sparsity)]
        if not targets:
            raise SponError.of("sparsity", self.sparsity, "comma-separated numbers, as 0.5,0.6")
        method = adapter_sparsifier(self.method).name
        every = rows(targets, self.train_steps, self.batch_size, self.train_window, seeds=self.seeds, method=method)
        words = options.split_names(self.only)
        if words is None:
            return every
        found = list(dict.fromkeys(row for word in words for row in every if row.label.startswith(word)))
        if not found:
            labels = ", ".join(dict.fromkeys(repr(row.label) for row in every))
            raise SponError.of("only", self.only, f"beginnings of rows' labels: {labels}")
        return found


@command
def recover_command(given: RecoverOptions) -> None:
    """Show how much of uniform TEAL's gap comes back at equal bytes, by every step that is known to help.

    Masks alone, alphas, thresholds that are matched on the way, longer windows, the model's own samples (the last
    --text), more steps; and at the first target what was tried beside them. Each row is kept in OUTPUT as soon as it is
    measured, its adapter in OUTPUT/adapters; the same command goes on where it stopped.

    [dim]spon recover ./model -o o --text wiki.txt --text speeches.txt --text own.txt --test test.txt --workers 5[/dim]
    """
    wanted = given.rows()
    given.check(PRESETS["fast"])
    other = None if given.against is None else RowStore.of(given.against)
    announce(f"This measures {len(wanted)} rows, less those that {given.output} has")
    failed = False
    if given.workers == 1:
        failed = bool(work(given, wanted))
    elif given.workers > 1:
        given.sources("train"), given.tests()  # one process says what is wrong with them, not each
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_work, args=(given, wanted), daemon=True) for _ in range(given.workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        if _WRONG in codes:
            raise SponError.of("workers", codes, "processes that end well", "The lines above say what is wrong.")
        failed = any(codes)
    flat, dense = write_tables(given.output, wanted, other)
    if dense is None:
        raise SponError.of("output", str(given.output), "rows that were measured", "The lines above say what failed.")
    if given.json:
        show_json({"rows": flat})
    else:
        show_table("Recovery", columns(dense), lines(flat))
        note(f"Tables and plot written to {given.output}")
    missing = [row.name for row in wanted if failed and not RowStore.of(given.output).has(row.name)]
    if missing:
        raise SponError.of("rows", ", ".join(missing), "rows that were measured", "The lines above say what failed.")


_WRONG = 2  # how a worker ends that was asked for what cannot be


def _work(given: RecoverOptions, wanted: Sequence[Row]) -> None:
    """`work`, in a process of its own."""
    try:
        failed = work(given, wanted)
    except SponError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_WRONG)
    sys.exit(1 if failed else 0)


def work(given: RecoverOptions, wanted: Sequence[Row]) -> list[str]:
    """Measure what no other process has or is at; the names of rows that could not be."""
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // max(1, given.workers))))
    sources, held_out = given.sources("train"), given.tests()
    loaded = given.load()
    tests = {
        f"{test.name}, {length}": loaded.leading_windows(test, length, given.max_tokens)
        for length in dict.fromkeys((given.window, SHORT))
        for test in held_out
    }

    @cache
    def windows(texts: int | None, window: int, count: int) -> Tensor:
        return loaded.mixed_windows(sources[:texts], window, count, given.seed)

    length = PRESETS["fast"].window
    calibration = loaded.mixed_windows(sources[:2], length, given.calibration_tokens // length, given.seed)
    settings = {
        **given.common(loaded, tests, PRESETS["fast"]),
        "calibration": windows_digest(calibration),
        "training_texts": [hashlib.sha256(source.text.encode()).hexdigest()[:16] for source in sources],
    }
    if given.against is not None:
        check_against(RowStore.of(given.against), settings)
    on_device = loaded.model.device.type != "cpu"
    study = Recovery(
        model=loaded.model, sites=loaded.sites, tests=tests, protocol=given.protocol, seed=given.seed,
        base_model=base_name(loaded.name),
        batch_size=16 if on_device else 4, keep_on_device=on_device, windows=windows, calibration=calibration,
    )  # fmt: skip
    with row_bars(len(wanted) + 1, _line) as (study.stage, study.done):
        return study.run(wanted, RowStore(given.output, settings))


def write_tables(
    output: Path, wanted: Sequence[Row], other: RowStore | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Write table.md, table.csv, table.json and recovery.png of the rows that are there.

    Args:
        output: the directory of the rows.
        wanted: which.
        other: rows of another model on the same texts, whose dense model and uniform TEAL take the place of these.

    Returns:
        `recovery_tables.records` of the rows, and the dense model's row; none and None where there are none.

    Raises:
        SponError: the other rows are of other texts.
    """
    if not (output / SETTINGS).is_file():
        return [], None
    store = RowStore.of(output)
    found = [store.read(row.name) for row in wanted if store.has(row.name)]
    dense = store.read(DENSE) if store.has(DENSE) else None
    if other is not None:
        check_against(other, store.settings)
        dense = other.read(DENSE)
        found = [row for row in other.all() if row.get("label") == UNIFORM] + [
            row for row in found if row["label"] != UNIFORM
        ]
    if dense is None or not found:
        return [], dense
    flat = records(found, dense)
    (output / "table.md").write_text(markdown(found, dense, flat), encoding="utf-8")
    (output / "table.csv").write_text(csv_text(flat), encoding="utf-8")
    (output / "table.json").write_text(json_text({"settings": store.settings, "rows": flat}), encoding="utf-8")
    plot_recovery(flat, output / "recovery.png")
    return flat, dense


def check_against(other: RowStore, settings: Mapping[str, Any]) -> None:
    """Raise `SponError` unless the other rows are of the texts of these settings."""
    if other.settings.get("tests") != settings["tests"]:
        raise SponError.of("against", str(other.directory), "rows of the same --test texts, --window, --max-tokens")


def _line(row: dict[str, Any]) -> str:
    """A row that was just measured, in words."""
    tests = ", ".join(f"{name} {number(result['perplexity'])}" for name, result in row["tests"].items())
    if row["name"] == DENSE:
        return f"{DENSE}: {tests}"
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in row["seconds"].items())
    loss = f", loss {row['loss']['last']:.4f}" if "loss" in row else ""
    return f"{row['sparsity']:.0%} {row['label']}, seed {row['seed']}: {tests}{loss} ({seconds})"
