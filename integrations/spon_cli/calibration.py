# SPDX-License-Identifier: Apache-2.0
"""Calibration as `spon calibrate`, `train` and `quickstart` share it: windows from a mix of texts, then thresholds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from spon_cli.loading import Loaded, base_name
from spon_plugin import Adapter, SponError, __version__
from spon_plugin.progress import Progress
from spon_plugin.sparsifiers.calibrate import calibrate
from spon_transformers.text_sources import TextSource

CALIBRATION_TOKENS = 16384
HELD_OUT_WINDOWS = 4


@dataclass(frozen=True)
class Settings:
    """How to calibrate; see `spon_plugin.sparsifiers.calibrate.calibrate`.

    Attributes:
        method: of sparsification, by its name.
        window: tokens per calibration window.
        calibration_tokens: in all windows.
        seed: of the windows' order.
        match: hold the target in the sparse model itself.
    """

    sparsity: float
    method: str = "teal"
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
    windows, held_out = calibration_windows(loaded, sources, settings)
    return calibrate(
        loaded.model,
        loaded.sites,
        windows,
        held_out,
        sparsity=settings.sparsity,
        method=settings.method,
        alpha=settings.alpha,  # type: ignore[arg-type]
        alpha_modules=settings.alpha_modules,
        dense_prefix=settings.dense_prefix,
        source={
            "text": [source.name for source in sources],
            "seed": settings.seed,
            "dtype": loaded.dtype,
            "windows_begin_with": loaded.opening,
            "spon_plugin": __version__,
        },
        base_model=base_name(loaded.name),
        match=settings.match,
        stage=stage,
    )


def calibration_windows(
    loaded: Loaded, sources: Sequence[TextSource], settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to calibrate on, and others, of the same mix, to measure the achieved sparsity on."""
    length, count = settings.window, settings.calibration_tokens // max(1, settings.window)
    if length < 2 or count < 1:
        raise SponError.of("tokens", settings.calibration_tokens, f"at least one window of {max(2, length)} tokens")
    return split_held_out(loaded.mixed_windows(sources, length, count + HELD_OUT_WINDOWS, settings.seed), count)


def split_held_out(windows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows to work with, and those after them: all beyond `count`, or a quarter of a text that has no more.

    Args:
        windows: token ids ``[count + HELD_OUT_WINDOWS, length]``, or fewer.
        count: how many were asked for.

    Raises:
        SponError: there is one window only.
    """
    if len(windows) < 2:
        expected = "at least two windows: one to calibrate on, one to measure the sparsity on"
        raise SponError.of("text", f"{len(windows)} windows of {windows.shape[1]} tokens", expected, "Use more text.")
    if len(windows) <= count:
        count = len(windows) - max(1, min(HELD_OUT_WINDOWS, len(windows) // 4))
    return windows[:count], windows[count:]
