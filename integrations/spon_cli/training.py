# SPDX-License-Identifier: Apache-2.0
"""Training as `spon train` and `spon quickstart` share it: from texts to alphas, and the files of the result."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from spon_cli.calibration import HELD_OUT_WINDOWS, split_held_out
from spon_cli.loading import Loaded
from spon_cli.model_card import adapter_card
from spon_cli.output import note
from spon_cli.plots import COLORS, figure
from spon_cli.progress import Stage
from spon_plugin import Adapter, SponError
from spon_plugin.adapter.directory import save_adapter_files
from spon_plugin.adapter.hub import CARD_NAME
from spon_plugin.files import new_directory
from spon_plugin.sparsifiers.calibrate import settle
from spon_plugin.studies.evaluation import Evaluation
from spon_plugin.training.recipe import Recipe
from spon_transformers.text_sources import TextSource


def work_directory(output: Path, resume: bool) -> Path:
    """Where checkpoints are kept while training: beside the output, so an interrupted run leaves no half adapter.

    Raises:
        SponError: there are checkpoints of an earlier run and `resume` is False, or none and it is True.
    """
    work = output.with_name(output.name + ".training")
    if resume and not work.is_dir():
        raise SponError.of("--resume", str(work), "the directory of an interrupted run", "Start without --resume.")
    if not resume and work.exists():
        raise SponError.of(
            "output", str(work), "no checkpoints of an earlier run", "Add --resume to go on, or remove the directory."
        )
    return work


@contextmanager
def checkpoints_in(work: Path) -> Iterator[None]:
    """Remove checkpoints when the block ends; keep them where it fails and there is one to go on from."""
    try:
        yield
    except BaseException:
        if any(work.glob("checkpoint-*")):
            note(f"There are checkpoints in {work}: the same command with --resume goes on from the last.")
        else:
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work)


def train(
    loaded: Loaded,
    adapter: Adapter,
    sources: Sequence[TextSource],
    recipe: Recipe,
    work: Path,
    seed: int,
    gradient_checkpointing: bool,
    stage: Stage,
) -> tuple[Adapter, list[dict[str, float]]]:
    """Train `adapter` on an even mix of the texts and note the recipe in its `calibration` field."""
    from spon_peft.training import train_adapter

    rows = loaded.mixed_windows(sources, recipe.window, recipe.windows + HELD_OUT_WINDOWS, seed)
    windows, held_out = split_held_out(rows, recipe.windows)
    actual = replace(recipe, windows=len(windows))
    adapter, losses = train_adapter(
        loaded.model, adapter, windows, actual, work, seed, gradient_checkpointing, progress=stage("Training")
    )
    stage("Measuring the sparsity")
    adapter = settle(loaded.model, adapter, windows, held_out)
    training = {**actual.as_dict(), "text": [s.name for s in sources], "seed": seed, "tokens": int(windows.numel())}
    training["dtype"] = loaded.dtype
    adapter.fields.calibration = {**adapter.fields.calibration, "training": training}
    return adapter, losses


def save(
    adapter: Adapter,
    output: Path,
    losses: Sequence[dict[str, float]] = (),
    evaluations: Sequence[tuple[TextSource, Evaluation]] = (),
) -> None:
    """Write the adapter with its model card, and its loss curve if it was trained, whole or not at all."""
    adapter.check()
    with new_directory(output) as directory:
        save_adapter_files(adapter, directory)
        (directory / CARD_NAME).write_text(adapter_card(adapter, evaluations), encoding="utf-8")
        if losses:
            with (directory / "loss.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(losses[0]))
                writer.writeheader()
                writer.writerows(losses)
            _plot(losses, directory / "loss.png")


def _plot(losses: Sequence[dict[str, float]], file: Path) -> None:
    steps, values = [row["step"] for row in losses], [row["loss"] for row in losses]
    width = max(1, len(values) // 20)
    smooth = [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
    with figure(file, width=7, height=4) as (axes,):
        axes.plot(steps, values, color="0.75", linewidth=1, label="step")
        axes.plot(steps, smooth, color=COLORS["SPON"], label=f"mean of {width} steps")
        axes.set(xlabel="step", ylabel="KL(dense || sparse), nats per token", ylim=(0, None))
        axes.legend()
