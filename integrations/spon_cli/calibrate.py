# SPDX-License-Identifier: Apache-2.0
"""`spon calibrate`: thresholds for a target sparsity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from spon_cli import options
from spon_cli.output import note, percent, progress_bars, show_json, show_table
from spon_cli.sources import TextSource, text_sources
from spon_plugin import Adapter, Site, SponError, __version__, find_sites, write_adapter
from spon_plugin.adapter.config import ALLOCATIONS, SponFields
from spon_plugin.calibration.text import mixed_windows
from spon_plugin.files import check_new
from spon_plugin.masking import check_sparsity
from spon_plugin.progress import Progress
from spon_plugin.sparsifiers.calibrate import calibrate

CALIBRATION_TOKENS = 16384
HELD_OUT_WINDOWS = 4


def calibrate_command(
    model: options.Model,
    output: options.Output,
    sparsity: options.Sparsity = 0.5,
    allocation: options.Allocation = "uniform",
    text: options.Text = None,
    dataset: options.Dataset = None,
    alpha: Annotated[
        str, typer.Option(help=r"none (plain TEAL), or mean (the control: E\[x - S(x)], untrained).")
    ] = "none",
    match: options.Match = False,
    target_modules: options.Targets = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to calibrate on.")] = CALIBRATION_TOKENS,
    window: options.Window = 256,
    dense_prefix: options.DensePrefix = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Find thresholds that reach a target sparsity, and write an adapter without alphas: plain TEAL.

    [dim]spon calibrate ./model --sparsity 0.5 -o teal50[/dim]

    [dim]spon calibrate org/model --sparsity 0.4 --allocation greedy --text wiki.txt --text code.txt -o teal40[/dim]
    """
    check_new(output)
    check_sparsity(sparsity)
    check_choice("allocation", allocation, ALLOCATIONS)
    check_choice("alpha", alpha, ("none", "mean"))
    sources = text_sources(text, dataset)
    settings = Settings(sparsity, allocation, alpha, "all", dense_prefix, window, tokens, seed, match)
    loaded = load(model, dtype, options.split_names(target_modules))
    with progress_bars() as stage:
        adapter = calibrated(loaded, sources, settings, stage)
    write_adapter(adapter, output)
    if json:
        show_json({"adapter": str(output), **summary(adapter)})
        return
    show_sparsity(adapter)
    note(f"Adapter written to {output}")


@dataclass
class Loaded:
    """A model with what the commands need of it.

    Attributes:
        name: as the user gave it.
        dtype: likewise.
    """

    name: str
    dtype: str
    model: Any
    tokenizer: Any
    sites: list[Site]


@dataclass(frozen=True)
class Settings:
    """How to calibrate; see `spon_plugin.sparsifiers.calibrate.calibrate`.

    Attributes:
        window: tokens per calibration window.
        calibration_tokens: in all windows.
        seed: of the windows' order.
        match: hold the target in the sparse model itself.
    """

    sparsity: float
    allocation: str = "uniform"
    alpha: str = "none"
    alpha_modules: str | list[str] = "all"
    dense_prefix: int | None = None
    window: int = 256
    calibration_tokens: int = CALIBRATION_TOKENS
    seed: int = 0
    match: bool = False


def calibrated(
    loaded: Loaded, sources: Sequence[TextSource], settings: Settings, stage: Callable[[str], Progress]
) -> Adapter:
    """Calibrate an adapter on an even mix of texts."""
    windows, held_out = _windows(loaded.tokenizer, sources, settings)
    return calibrate(
        loaded.model,
        loaded.sites,
        windows,
        held_out,
        sparsity=settings.sparsity,
        allocation=settings.allocation,
        alpha=settings.alpha,  # type: ignore[arg-type]
        alpha_modules=settings.alpha_modules,
        dense_prefix=settings.dense_prefix,
        source={
            "text": [source.name for source in sources],
            "seed": settings.seed,
            "dtype": loaded.dtype,
            "spon_plugin": __version__,
        },
        base_model=base_name(loaded.name),
        match=settings.match,
        stage=stage,
    )


def load(name: str, dtype: str, target_modules: Sequence[str] | None = None, precision: str | None = None) -> Loaded:
    """Load a model and its tokenizer and find its input sites.

    Args:
        name: as the user gave it.
        dtype: of the weights.
        target_modules: names of the linears to sparsify; all by default.
        precision: quantizes the linears, see `load_precision`.

    Raises:
        SponError: the model cannot be loaded, or a target is not one of its linears.
    """
    from transformers.utils import logging

    from spon_transformers.loading import load_model, load_tokenizer
    from spon_transformers.precision import load_precision

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # ours say what is going on
    tokenizer = load_tokenizer(name)
    model = load_model(name, dtype) if precision is None else load_precision(name, precision, dtype)
    return Loaded(name, dtype, model, tokenizer, find_sites(model, target_modules))


def base_name(model: str) -> str:
    """What an adapter calls its base model: the absolute path of a local one, so that it is found from anywhere."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() else model


def base_of(adapter: Adapter, path: str) -> str:
    """The base model that an adapter names.

    Raises:
        SponError: it names none.
    """
    if not adapter.base_model:
        raise SponError.of(f"{path}: base_model_name_or_path", adapter.base_model, "the base model's name or path")
    return adapter.base_model


def check_choice(field: str, value: str, allowed: Sequence[str]) -> None:
    """Raise `SponError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise SponError.of(field, value, "one of " + ", ".join(allowed))


def _windows(tokenizer: Any, sources: Sequence[TextSource], settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to calibrate on, and others, of the same mix, to measure the achieved sparsity on."""
    length, count = settings.window, settings.calibration_tokens // max(1, settings.window)
    if length < 2 or count < 1:
        raise SponError.of("tokens", settings.calibration_tokens, f"at least one window of {max(2, length)} tokens")
    texts = [source.text for source in sources]
    return split_held_out(mixed_windows(tokenizer, texts, length, count + HELD_OUT_WINDOWS, settings.seed))


def split_held_out(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All but the last windows ``[count, length]``, and those: `HELD_OUT_WINDOWS`, or a quarter of a few.

    Raises:
        SponError: there is one window only.
    """
    if len(windows) < 2:
        expected = "at least two windows: one to calibrate on, one to measure the sparsity on"
        raise SponError.of("text", f"{len(windows)} windows of {windows.shape[1]} tokens", expected, "Use more text.")
    held_out = max(1, min(HELD_OUT_WINDOWS, len(windows) // 4))
    return windows[:-held_out], windows[-held_out:]


def summary(adapter: Adapter) -> dict[str, Any]:
    """An adapter in a few figures, for ``--json``."""
    fields: SponFields = adapter.fields
    return {
        "base_model": adapter.base_model,
        "digest": adapter.digest,
        "allocation": fields.allocation,
        "sparsity": {"target": fields.sparsity, "achieved": fields.calibration.get("achieved_sparsity")},
        "linears": len(adapter.thresholds),
        "per_channel": sum(threshold.numel() > 1 for threshold in adapter.thresholds.values()),
        "centers": len(adapter.centers),
        "alphas": len(adapter.alphas),
        "tokens": fields.tokens,
        "dense_prefix": fields.dense_prefix,
    }


def show_sparsity(adapter: Adapter) -> None:
    """Print achieved sparsity per role: the lowest, mean and highest over the blocks."""
    calibration = adapter.fields.calibration
    roles: dict[str, list[tuple[float, list[str]]]] = {}
    for name, site in calibration.get("sites", {}).items():
        roles.setdefault(name.rpartition(".")[2], []).append((site["achieved_sparsity"], site["modules"]))
    rows = []
    for role, values in roles.items():
        shares = [share for share, _ in values]
        linears = ", ".join(path.rpartition(".")[2] for path in values[0][1])
        rows.append([f"{role} ({linears})", *(percent(f(shares)) for f in (min, _mean, max))])
    rows.append(["model, weighted", None, percent(calibration.get("achieved_sparsity")), None])
    title = (
        f"Achieved sparsity on held-out tokens, target {percent(adapter.fields.sparsity)} ({adapter.fields.allocation})"
    )
    show_table(title, ["site", "lowest block", "mean", "highest block"], rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
