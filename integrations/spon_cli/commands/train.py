# SPDX-License-Identifier: Apache-2.0
"""`spon train`: calibrate if need be, then distil alphas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer

from spon_cli import options
from spon_cli.adapter_summary import show_sparsity, summary
from spon_cli.calibration import Settings, calibrated
from spon_cli.command import Between, command
from spon_cli.duration import announce, announce_time, calibration_passes, schedule, training_passes
from spon_cli.loading import Loaded
from spon_cli.output import note, show_json
from spon_cli.progress import progress_bars
from spon_cli.training import checkpoints_in, save, train, work_directory
from spon_plugin import Adapter, SponError, read_adapter
from spon_plugin.adapter.base import base_digest, base_of
from spon_plugin.adapter.config import carries_alpha
from spon_plugin.adapter.directory import is_adapter_name
from spon_plugin.adapter.mask import with_alphas
from spon_plugin.decoder.sites import linear_inputs
from spon_plugin.files import check_new
from spon_plugin.masking import check_sparsity
from spon_plugin.sparsifiers.calibrate import method_of
from spon_plugin.training.loop import loss_ends
from spon_plugin.training.recipe import PRESETS, Recipe, preset

_OF_THE_PRESET = "the preset's"
_COUNT = Between(1, options.MANY)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(options.ModelOptions, options.MethodOptions, options.TextOptions, options.SeedOptions):
    """Options of `spon train`."""

    model: Annotated[
        str, typer.Argument(metavar="MODEL|ADAPTER", help="A model to calibrate first, or an adapter to train further.")
    ]
    output: options.Output
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the linears' inputs to zero, in [0, 1).", show_default="0.5")
    ] = None
    match: options.Match = False
    alpha_modules: Annotated[
        str | None,
        typer.Option(
            help="Which linears carry an alpha: all, or comma-separated names such as down_proj.", show_default="all"
        ),
    ] = None
    target_modules: options.Targets = None
    preset: Annotated[str, typer.Option(help="The schedule: " + " or ".join(PRESETS) + ".")] = "fast"
    windows: Annotated[
        int | None, typer.Option(help="Training windows in all.", show_default=_OF_THE_PRESET), _COUNT
    ] = None
    window: Annotated[
        int | None, typer.Option(help="Tokens per window.", show_default=_OF_THE_PRESET), Between(2, options.MANY)
    ] = None
    batch_size: Annotated[int | None, typer.Option(help="Windows per step.", show_default=_OF_THE_PRESET), _COUNT] = (
        None
    )
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the windows.", show_default=_OF_THE_PRESET), _COUNT
    ] = None
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Highest rate; relative to thresholds for fast, and a third of it under sensitivity.",
            show_default=_OF_THE_PRESET,
        ),
    ] = None
    weight_decay: Annotated[
        float | None, typer.Option(help="Pulls alphas towards zero; in the units of the rate.", show_default="0")
    ] = None
    temperature: Annotated[
        float | None, typer.Option(help="Of the loss: divides both models' logits.", show_default="1")
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(help="Of the loss: the likeliest tokens, and all others as one.", show_default="all"),
    ] = None
    entropy_power: Annotated[
        float | None,
        typer.Option(help="Of the loss: tokens count (1 + dense entropy) ** this.", show_default="0"),
    ] = None
    hidden_weight: Annotated[
        float | None,
        typer.Option(help="Of the loss: of the states after four blocks.", show_default="0"),
    ] = None
    dense_prefix: options.DensePrefix = None
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, about a third more time.")] = False
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the same command was interrupted.")] = False

    @property
    def targets(self) -> list[str] | None:
        """Names of the linears to sparsify; None for all."""
        return options.split_names(self.target_modules)

    @property
    def carriers(self) -> str | list[str] | None:
        """Which linears carry an alpha, as the adapter's config says it; None where the user did not."""
        return "all" if self.alpha_modules == "all" else options.split_names(self.alpha_modules)

    def recipe(self) -> Recipe:
        """The preset with the changes that the user asked for."""
        names = ["windows", "window", "batch_size", "epochs", "learning_rate", "weight_decay"]
        names += ["temperature", "top_k", "entropy_power", "hidden_weight"]
        return preset(self.preset).with_changes(**{name: getattr(self, name) for name in names})

    def settings(self) -> Settings:
        """How to calibrate, where there is no adapter yet."""
        return Settings(
            check_sparsity(0.5 if self.sparsity is None else self.sparsity),
            self.method_name() or "teal",
            "zero",
            "all" if self.carriers is None else self.carriers,
            self.dense_prefix,
            self.recipe().window,
            seed=self.seed,
            match=self.match or bool(self.recipe().rematch),
        )


@command
def train_command(given: TrainOptions) -> None:
    """Train spontaneous activations: the sparse model learns to say what the dense one says.

    Texts are mixed evenly; several kinds of text generalise better than one. The loss of every step is saved beside the
    adapter as loss.csv and loss.png.

    [dim]spon train ./model --sparsity 0.5 --text wiki.txt --text speeches.txt --text docs.txt -o spon50[/dim]

    [dim]spon train teal50 -o spon50 --alpha-modules down_proj[/dim]
    """
    check_new(given.output)
    recipe, settings = given.recipe(), given.settings()
    start = read_adapter(given.model) if is_adapter_name(given.model) else None
    if start is not None:
        start.check_masks_alone("spon train")
        _check_continued(start, given)
    work = work_directory(given.output, given.resume)
    calibrating = "" if start is not None else f"calibrates on {settings.calibration_tokens} tokens, "
    announce(f"This {calibrating}trains {schedule(recipe)} and measures the sparsity")
    sources = given.sources()
    base = given.model if start is None else base_of(start.peft, given.model)
    loaded = given.load(given.targets, base=base)
    tokens = 0 if start is not None else settings.calibration_tokens
    announce_time(loaded.model, calibration_passes(settings.method, tokens) + training_passes(recipe))
    with checkpoints_in(work):
        with progress_bars() as stage:
            if start is None:
                adapter = calibrated(loaded, sources, settings, stage)
            else:
                start.check_base(linear_inputs(loaded.model), base, base_digest(loaded.model))
                adapter = _with_alphas(start, loaded, settings.alpha_modules)
                adapter.fields.calibration["matched"] = settings.match or bool(start.fields.calibration.get("matched"))
            adapter, losses = train(
                loaded, adapter, sources, recipe, work, given.seed, given.gradient_checkpointing, stage
            )
        save(adapter, given.output, losses)
    ends = loss_ends(losses)
    if given.json:
        show_json({"adapter": str(given.output), **summary(adapter), "recipe": recipe.as_dict(), "loss": ends})
        return
    show_sparsity(adapter)
    note(f"KL from {ends['first']:.3f} to {ends['last']:.3f} nats per token over {len(losses)} steps")
    note(f"Adapter written to {given.output}; the loss curve is in {given.output / 'loss.png'}")


def _check_continued(start: Adapter, given: TrainOptions) -> None:
    """Raise `SponError` for an option that an adapter to train further has settled already."""
    fields = start.fields
    settled: list[tuple[str, Any, Any]] = [
        ("sparsity", given.sparsity, fields.sparsity),
        ("method", given.method_name(), method_of(fields)),
        ("dense_prefix", given.dense_prefix, fields.dense_prefix),
        ("target_modules", given.targets, start.peft.get("target_modules")),
        ("alpha_modules", given.carriers, fields.alpha_modules if start.has_alpha else None),
    ]
    for field, value, kept in settled:
        if value is None or kept is None:
            continue
        if _unordered(value) != _unordered(kept):
            raise SponError.of(field, value, f"{kept}, the adapter's", "Or start from the model.")


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def _with_alphas(start: Adapter, loaded: Loaded, alpha_modules: str | list[str]) -> Adapter:
    """An adapter to train further: its alphas, or zeros where it has none yet."""
    if start.has_alpha:
        return start
    inputs = linear_inputs(loaded.model)
    alphas = {path: torch.zeros(inputs[path]) for path in start.masks if carries_alpha(path, alpha_modules)}
    if not alphas:
        raise SponError.of("alpha_modules", alpha_modules, '"all" or names of the adapter\'s linears')
    fields = replace(start.fields, alpha_modules=alpha_modules)
    return replace(start, fields=fields, masks=with_alphas(start.masks, alphas))
