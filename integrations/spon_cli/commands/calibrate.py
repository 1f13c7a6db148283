# SPDX-License-Identifier: Apache-2.0
"""`spon calibrate`: thresholds for a target sparsity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from spon_cli import options
from spon_cli.adapter_summary import show_sparsity, summary
from spon_cli.calibration import CALIBRATION_TOKENS, Settings, calibrated
from spon_cli.command import Between, command
from spon_cli.output import note, show_json
from spon_cli.progress import progress_bars
from spon_cli.training import save
from spon_plugin.files import check_new
from spon_plugin.masking import check_sparsity


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(options.ModelOptions, options.MethodOptions, options.TextOptions, options.SeedOptions):
    """Options of `spon calibrate`."""

    output: options.Output
    sparsity: options.Sparsity = 0.5
    alpha: Annotated[str, typer.Option(help=r"none (plain TEAL), or mean (the control: E\[x - S(x)], untrained).")] = (
        "none"
    )
    match: options.Match = False
    target_modules: options.Targets = None
    tokens: Annotated[int, typer.Option(help="How many tokens to calibrate on."), Between(1, options.MANY)] = (
        CALIBRATION_TOKENS
    )
    window: options.Window = 256
    dense_prefix: options.DensePrefix = None

    def settings(self) -> Settings:
        """How to calibrate."""
        return Settings(
            self.sparsity,
            self.method_name() or "teal",
            self.alpha,
            "all",
            self.dense_prefix,
            self.window,
            self.tokens,
            self.seed,
            self.match,
        )


@command
def calibrate_command(given: CalibrateOptions) -> None:
    """Find thresholds that reach a target sparsity, and write an adapter without alphas: TEAL, or other masks.

    [dim]spon calibrate ./model --sparsity 0.5 -o teal50[/dim]

    [dim]spon calibrate org/model --sparsity 0.4 --method wina --text wiki.txt --text code.txt -o wina40[/dim]
    """
    check_new(given.output)
    check_sparsity(given.sparsity)
    settings = given.settings()
    options.check_choice("alpha", given.alpha, ("none", "mean"))
    sources = given.sources()
    loaded = given.load(options.split_names(given.target_modules))
    with progress_bars() as stage:
        adapter = calibrated(loaded, sources, settings, stage)
    save(adapter, given.output)
    if given.json:
        show_json({"adapter": str(given.output), **summary(adapter)})
        return
    show_sparsity(adapter)
    note(f"Adapter written to {given.output}")
