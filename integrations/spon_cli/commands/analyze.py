# SPDX-License-Identifier: Apache-2.0
"""`spon analyze`: what masks do to hidden states, what alpha brings back, and what alphas became."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from spon_cli import options
from spon_cli.command import Between, command
from spon_cli.loading import Loaded
from spon_cli.output import note, show_json, show_table
from spon_cli.progress import progress_bars
from spon_cli.study_plots import plot_points, plot_shift
from spon_plugin import Adapter, SponError, read_adapter, sparse_inputs
from spon_plugin.adapter.base import base_digest
from spon_plugin.calibration.streaming import SINKS
from spon_plugin.calibration.text import opening, read_text, token_ids
from spon_plugin.decoder.sites import linear_inputs
from spon_plugin.files import check_new, new_directory
from spon_plugin.progress import Progress
from spon_plugin.studies.alpha_statistics import AlphaStatistics, alpha_statistics
from spon_plugin.studies.hidden_shift import (
    PROJECTIONS,
    block_outputs,
    check_projection,
    check_prompts,
    linear_cka,
    project,
    prompt_means,
    relative_distance,
)
from spon_plugin.studies.tables import csv_text, json_text, markdown_table
from spon_transformers.text_sources import TextSource
from spon_transformers.windows import check_length

SHIFT = ("variant", "block", "distance", "cka")
NOTES = (
    "distance: ||h - h_dense|| / ||h_dense||, the mean over tokens. CKA: linear centred kernel alignment with the "
    "dense model's states, 1 where they agree up to rotation and scale. Position 0 and the dense prefix are left out."
)
ALPHA_NOTES = (
    "Means over the blocks. norm: of alpha. rms, largest: of alpha, over the threshold. bias: ||W alpha||. "
    "energy: ||W alpha||^2 / E||W x + b||^2. cosine: of alpha and E(x - S(x)), the bias without training."
)


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions(options.ModelOptions, options.TextOptions, options.SeedOptions):
    """Options of `spon analyze`."""

    adapter: options.AdapterOption
    output: Annotated[Path | None, options.output_option("Directory to make for tables and plots.")] = None
    prompts: Annotated[Path | None, typer.Option(help="A file with one prompt per line.")] = None
    count: Annotated[int, typer.Option(help="How many prompts."), Between(2, options.MANY)] = 50
    max_length: Annotated[
        int, typer.Option(help="Tokens of a prompt; the rest is cut off."), Between(2, options.MANY)
    ] = 64
    projection: Annotated[str, typer.Option(help=" or ".join(PROJECTIONS) + ", for the picture.")] = "tsne"

    def check(self) -> None:
        """Raise `SponError` for what can be told without texts and model."""
        if self.output is not None:
            check_new(self.output)
            check_projection(self.projection)
        if self.prompts is not None and (self.text or self.dataset):
            raise SponError.of("prompts", str(self.prompts), "either --prompts or --text and --dataset")

    def ids(self, loaded: Loaded, sources: Sequence[TextSource], lines: Sequence[str]) -> list[Tensor]:
        """The prompts as token ids: lines where there are any, else windows of the texts."""
        if self.prompts is None:
            return list(loaded.mixed_windows(sources, self.max_length, self.count, self.seed))
        first = opening(loaded.tokenizer)
        rows = [first + token_ids(loaded.tokenizer, line) for line in lines[: self.count]]
        check_length(loaded.model, min(self.max_length, max(map(len, rows))))
        return [loaded.checked(torch.tensor(row[: self.max_length], dtype=torch.int64)) for row in rows]


@command
def analyze_command(given: AnalyzeOptions) -> None:
    """Measure how far masks shift the hidden states, and how much of it alpha brings back: figure 3 of the paper.

    Per decoder block: relative distance and linear CKA, TEAL and SPON against the dense model. Then each alpha beside
    its threshold and its layer's output. Prompts are cut from --text (Python's language reference by default) or are
    the lines of --prompts. With -o there are Markdown, CSV, JSON and plots; t-SNE needs scikit-learn (extra: analyze).

    [dim]spon analyze ./model --adapter spon50 --text wiki.test.txt -o analysis[/dim]

    [dim]spon analyze ./model --adapter spon50 --prompts prompts.txt --json[/dim]
    """
    given.check()
    adapter = read_adapter(given.adapter)
    adapter.check_masks_alone("spon analyze")
    sources = [] if given.prompts is not None else given.sources("test")
    lines = [] if given.prompts is None else [line for line in read_text(given.prompts).splitlines() if line.strip()]
    loaded = given.load()
    adapter.check_base(linear_inputs(loaded.model), given.model, base_digest(loaded.model))
    ids = given.ids(loaded, sources, lines)
    skip = max(SINKS, adapter.fields.dense_prefix)
    check_prompts(ids, skip)
    with progress_bars() as stage:
        states = all_states(loaded, adapter, ids, stage)
        statistics = []
        if adapter.has_alpha:
            statistics = alpha_statistics(loaded.model, adapter, loaded.sites, ids, stage("Alphas"))
    shift = hidden_shift(states)
    report = {
        "model": given.model,
        "adapter": str(given.adapter),
        "prompts": str(given.prompts) if given.prompts is not None else [source.name for source in sources],
        "count": len(ids),
        "tokens": sum(map(len, ids)),
        "windows_begin_with": loaded.opening,
        "shift": shift,
        "alphas": [asdict(row) for row in statistics],
    }
    if given.output is not None:
        with new_directory(given.output) as directory:
            write(report, statistics, directory)
            panels = projected(states, [len(prompt) - skip for prompt in ids], given.projection, given.seed)
            plot_shift(shift, directory / "shift.png")
            plot_points(panels, given.projection, directory / f"{given.projection}.png")
    if given.json:
        show_json(report)
        return
    show(shift, statistics)
    if given.output is not None:
        note(f"Tables and plots written to {given.output}")


def all_states(
    loaded: Loaded, adapter: Adapter, prompts: Sequence[Tensor], stage: Callable[[str], Progress]
) -> dict[str, list[Tensor]]:
    """Variant -> hidden states ``[tokens, hidden]`` after each block; SPON only for an adapter with alphas."""
    prefix = adapter.fields.dense_prefix
    skip = max(SINKS, prefix)
    states = {"dense": block_outputs(loaded.model, prompts, skip, stage("dense"))}
    variants = {"TEAL": adapter.without_alpha()} | ({"SPON": adapter} if adapter.has_alpha else {})
    for name, variant in variants.items():
        with sparse_inputs(loaded.model, variant.masks, prefix):
            states[name] = block_outputs(loaded.model, prompts, skip, stage(name))
    return states


def hidden_shift(states: dict[str, list[Tensor]]) -> dict[str, list[dict[str, float]]]:
    """Variant -> per block, its distance and CKA with the dense model."""
    return {
        name: [
            {"distance": relative_distance(sparse, dense), "cka": linear_cka(sparse, dense)}
            for sparse, dense in zip(layers, states["dense"], strict=True)
        ]
        for name, layers in states.items()
        if name != "dense"
    }


def projected(
    states: dict[str, list[Tensor]], lengths: Sequence[int], projection: str, seed: int
) -> dict[str, dict[str, Tensor]]:
    """Title -> variant -> each prompt's mean state in the plane, after a quarter, half, three quarters and all blocks.

    All variants of a block are projected together, so that their places can be compared.
    """
    count = len(states["dense"])
    panels = {}
    for block in sorted({max(0, round(count * part / 4) - 1) for part in (1, 2, 3, 4)}):
        means = [prompt_means(layers[block], lengths) for layers in states.values()]
        places = project(torch.cat(means), projection, seed).split(len(lengths))
        panels[f"after block {block}"] = dict(zip(states, places, strict=True))
    return panels


def write(report: dict[str, Any], statistics: Sequence[AlphaStatistics], directory: Path) -> None:
    """Write the tables as Markdown, CSV and JSON."""
    (directory / "analysis.json").write_text(json_text(report), encoding="utf-8")
    flat = [
        dict(zip(SHIFT, (name, block, layer["distance"], layer["cka"]), strict=True))
        for name, layers in report["shift"].items()
        for block, layer in enumerate(layers)
    ]
    (directory / "shift.csv").write_text(csv_text(flat), encoding="utf-8")
    head, body = shift_table(report["shift"])
    lines = ["## Shift of the hidden states", "", *markdown_table(head, body), "", NOTES, ""]
    if statistics:
        (directory / "alphas.csv").write_text(csv_text([asdict(row) for row in statistics]), encoding="utf-8")
        head, body = alpha_table(statistics)
        lines += ["## Alphas", "", *markdown_table(head, body), "", ALPHA_NOTES, ""]
    (directory / "analysis.md").write_text("\n".join(lines), encoding="utf-8")


def shift_table(shift: dict[str, list[dict[str, float]]]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: one line per block, and the mean over them."""
    head = ["after block", *(f"{name} {what}" for name in shift for what in ("distance", "CKA"))]
    layers = list(zip(*shift.values(), strict=True))
    body = [
        [str(block), *(f"{values[key]:.3f}" for values in layer for key in ("distance", "cka"))]
        for block, layer in enumerate(layers)
    ]
    means = [_mean([layer[key] for layer in shift[name]]) for name in shift for key in ("distance", "cka")]
    return head, [*body, ["mean", *(f"{value:.3f}" for value in means)]]


def alpha_table(statistics: Sequence[AlphaStatistics]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: one line per name of a linear, means over the blocks."""
    figures = [f.name for f in fields(AlphaStatistics) if f.name not in ("module", "site", "role")]
    head = ["linear", "norm", "rms", "largest", "bias", "energy", "cosine"]
    body = []
    for leaf in dict.fromkeys(row.module.rpartition(".")[2] for row in statistics):
        rows = [row for row in statistics if row.module.rpartition(".")[2] == leaf]
        means = []
        for name in figures:
            values = [value for row in rows if (value := getattr(row, name)) is not None]
            means.append(f"{_mean(values):.3f}" if values else "-")
        body.append([leaf, *means])
    return head, body


def show(shift: dict[str, list[dict[str, float]]], statistics: Sequence[AlphaStatistics]) -> None:
    """Print both tables."""
    head, body = shift_table(shift)
    show_table("Shift of the hidden states", head, body, NOTES)
    if statistics:
        head, body = alpha_table(statistics)
        show_table("Alphas", head, body, ALPHA_NOTES)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
