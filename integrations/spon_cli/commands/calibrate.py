# SPDX-License-Identifier: Apache-2.0
"""`spon calibrate`: thresholds for a target sparsity."""

from __future__ import annotations

from typing import Annotated

import typer

from spon_cli import options
from spon_cli.adapter_summary import show_sparsity, summary
from spon_cli.calibration import CALIBRATION_TOKENS, Settings, calibrated
from spon_cli.loading import load
from spon_cli.output import note, progress_bars, show_json
from spon_plugin import write_adapter
from spon_plugin.adapter.config import ALLOCATIONS
from spon_plugin.files import check_new
from spon_plugin.masking import check_sparsity
from spon_transformers.text_sources import text_sources


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
    options.check_choice("allocation", allocation, ALLOCATIONS)
    options.check_choice("alpha", alpha, ("none", "mean"))
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
