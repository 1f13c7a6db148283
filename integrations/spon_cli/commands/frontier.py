# SPDX-License-Identifier: Apache-2.0
"""`spon frontier`: bits a weight, sparsity and alpha against quality, beside llama.cpp's formats."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from spon_cli import options
from spon_cli.command import Between, command
from spon_cli.duration import READ, announce, announce_time, calibration_passes, training_passes
from spon_cli.loading import base_name
from spon_cli.output import note, show_json, show_table
from spon_cli.progress import row_bars
from spon_cli.study_plots import plot_frontier
from spon_plugin import SponError, read_adapter
from spon_plugin.adapter.adapter import Adapter
from spon_plugin.adapter.base import base_digest
from spon_plugin.calibration.sensitivity import MATCH_TOKENS
from spon_plugin.calibration.text import windows_digest
from spon_plugin.decoder.sites import linear_inputs
from spon_plugin.sparsifiers.registry import adapter_sparsifier
from spon_plugin.studies.comparison import ON
from spon_plugin.studies.frontier import QUICK, Frontier, Key, keys
from spon_plugin.studies.frontier_tables import (
    columns,
    equal_bytes,
    in_words,
    label,
    line,
    markdown,
    pair_columns,
    pair_lines,
    records,
)
from spon_plugin.studies.rows import SETTINGS, RowStore
from spon_plugin.studies.tables import csv_text, json_text
from spon_plugin.training.recipe import PRESETS, Recipe, preset
from spon_transformers.formats import FULL, check_format, is_fit, is_masked, load_format

_FITTING = 5  # passes over the calibration text that rounding for a row's masks takes
_MATCHES = 3  # passes over `MATCH_TOKENS` that holding a target usually takes


@dataclass(frozen=True, kw_only=True)
class FrontierOptions(options.StudyOptions, options.LastWordOptions):
    """Options of `spon frontier`."""

    formats: Annotated[
        str,
        typer.Option(
            help="Comma-separated: bf16, int8, int4 (int4-g32, int4-g32-asym: groups of 32, zero points; int4-fit: "
            "rounded for the inputs that each row's masks leave), "
            "int3 (likewise, dense alone), and gguf: with a kind of llama.cpp's."
        ),
    ] = "bf16,int8,int4,gguf:Q4_K_M,gguf:Q3_K_M,gguf:Q2_K"
    sparsity: Annotated[str, typer.Option(help="Comma-separated shares; 0 is the dense model.")] = "0,0.25,0.4,0.5,0.6"
    alpha: Annotated[str, typer.Option(help="Comma-separated: off, on.")] = "off,on"
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="An adapter of this model, to be measured in every format as well; may repeat."),
    ] = None
    method: Annotated[str, typer.Option(help="What makes the masks, as for spon calibrate.")] = "teal"
    preset: Annotated[
        str | None,
        typer.Option(
            help="Another schedule of the alphas, as for spon train: " + ", ".join(PRESETS), show_default="quick"
        ),
    ] = None
    windows: Annotated[
        int | None,
        typer.Option(help="Training windows for each sparsity.", show_default=str(QUICK.windows)),
        Between(1, options.MANY),
    ] = None
    epochs: Annotated[
        int | None, typer.Option(help="Passes over them.", show_default=str(QUICK.epochs)), Between(1, options.MANY)
    ] = None
    window: Annotated[int, typer.Option(help="Tokens per window to evaluate on."), Between(2, options.MANY)] = 256

    def adapters(self) -> dict[str, Adapter]:
        """Those that were given, by the names of their directories."""
        found: dict[str, Adapter] = {}
        for directory in self.adapter or ():
            name = directory.resolve().name
            if name in found:
                raise SponError.of("adapter", f"two called {name}", "directories of different names")
            found[name] = read_adapter(directory)
            found[name].check_masks_alone("spon frontier")
        return found

    def keys(self, adapters: Mapping[str, Adapter]) -> list[Key]:
        """The rows that the user asked for, formats checked."""
        formats = options.split_names(self.formats) or []
        for name in formats:
            check_format(name)
        shares, alphas = options.split_numbers("sparsity", self.sparsity), options.split_names(self.alpha) or []
        return keys(formats, shares, alphas, is_masked, adapters)

    def recipe(self) -> Recipe:
        """The schedule of the alphas; the masks, which serve rows without alphas as well, stay as they are."""
        base = QUICK if self.preset is None else preset(self.preset)
        return base.with_changes(windows=self.windows, epochs=self.epochs, rematch=0)


@command
def frontier_command(given: FrontierOptions) -> None:
    """Draw what a model is worth for the bytes that a token reads: fewer bits, skipped inputs, alphas, llama.cpp.

    Weights in every format are scored with every share of their inputs skipped, with alphas and without; those of
    llama.cpp (gguf:) dense, as what would be used instead. Everything is compared with the model in bfloat16. Masks and
    alphas are made on that model, once for each sparsity, and run on all formats; adapters that you have already may be
    given instead. gguf: needs llama-cpp-python and a model of the kind of Llama, Qwen2 or Gemma 3.

    Each row is kept in OUTPUT as soon as it is measured; the same command goes on where it stopped, and formats or
    sparsities may be added. Without --text and --test, four fifths of Python's language reference are trained on and
    the rest is evaluated on.

    [dim]spon frontier ./model -o frontier --text wiki.txt --test wiki.test.txt --lambada lambada.jsonl[/dim]

    [dim]spon frontier ./model -o frontier --formats bf16,int4,gguf:Q3_K_M --sparsity 0,0.4 --windows 300[/dim]

    [dim]spon frontier ./model -o frontier --formats bf16,int4,int3 --sparsity 0 --adapter spon40 --adapter spon50[/dim]
    """
    adapters, recipe = given.adapters(), given.recipe()
    wanted = given.keys(adapters)
    method = adapter_sparsifier(given.method).name
    given.check(recipe)
    announce(f"This measures {len(wanted)} rows, less those that {given.output} has")
    sources, tests, last_words = given.sources("train"), given.tests(), given.last_word_texts()
    loaded = given.load()
    for adapter in adapters.values():
        adapter.check_base(linear_inputs(loaded.model), given.model, base_digest(loaded.model))
    calibration = loaded.mixed_windows(sources, recipe.window, given.calibration_tokens // recipe.window, given.seed)
    training = loaded.mixed_windows(sources, recipe.window, recipe.windows, given.seed)
    evaluated = given.test_windows(loaded, tests)
    settings = {
        **given.common(loaded, evaluated, recipe),
        **given.last_word_settings(last_words),
        "method": method,
        "texts": [source.name for source in sources],
        "training_windows": windows_digest(training),
        "calibration_windows": windows_digest(calibration),
    }
    study = Frontier(
        load=partial(
            load_format, given.model, windows=calibration, dtype=given.dtype, trust_remote_code=given.trust_remote_code
        ),
        is_fit=is_fit, full=FULL, tests=evaluated,
        calibration=calibration, training=training, directory=given.output, adapters=adapters,
        passages=loaded.encoded(last_words),
        method=method, recipe=recipe, protocol=given.protocol, seed=given.seed, base_model=base_name(loaded.name),
    )  # fmt: skip
    store = RowStore(given.output, settings)
    read = sum(windows.numel() for windows in evaluated.values()) + sum(len(each.ids) for each in study.passages)
    announce_time(loaded.model, _passes([key for key in wanted if not store.has(key.name)], given, recipe, read))
    del loaded.model  # one model in memory at a time
    with row_bars(len(wanted), in_words) as (study.stage, study.done):
        study.run(wanted, store)
    rows = store.all()  # with the rows of earlier runs
    rows.sort(key=lambda row: -row["bits_per_weight"])
    write_tables(rows, given.output)
    if given.json:
        show_json(as_json(rows, given.output))
        return
    show_table("Bits against quality", columns(rows), [line(row, rows) for row in rows])
    show_table("Where as many bytes are read", pair_columns(), pair_lines(rows))
    note(f"Tables and plot written to {given.output}")


def _passes(new: Sequence[Key], given: FrontierOptions, recipe: Recipe, read: int) -> int:
    """Passes of tokens through the model that these rows take, each of which is evaluated on `read` tokens."""
    made = {(key.sparsity, key.alpha) for key in new if key.is_made}
    trained = sum(alpha == ON for _, alpha in made)
    matching = _MATCHES * (len(made) + trained) * min(MATCH_TOKENS, given.calibration_tokens)
    calibrating = calibration_passes(given.method, given.calibration_tokens) if made else 0
    fitting = READ * _FITTING * given.calibration_tokens * sum(is_fit(key.format) for key in new)
    return calibrating + fitting + matching + trained * training_passes(recipe) + READ * (len(new) + 1) * read


def write_tables(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Write table.md, table.csv, table.json and plot.png into `output`."""
    (output / "table.md").write_text(markdown(rows), encoding="utf-8")
    (output / "table.csv").write_text(csv_text(records(rows)), encoding="utf-8")
    (output / "table.json").write_text(json_text(as_json(rows, output)), encoding="utf-8")
    plot_frontier(rows, output / "plot.png")


def as_json(rows: Sequence[dict[str, Any]], output: Path) -> dict[str, Any]:
    """Settings, rows and pairs of rows of equal bytes as one object."""
    return {
        "settings": json_module.loads((output / SETTINGS).read_text(encoding="utf-8")),
        "rows": records(rows),
        "equal_bytes": [[label(row) for row in pair] for pair in equal_bytes(rows)],
    }
