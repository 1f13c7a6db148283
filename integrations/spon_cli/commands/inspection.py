# SPDX-License-Identifier: Apache-2.0
"""`spon inspect`: what is in an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from spon_cli import options
from spon_cli.adapter_summary import show_kernels, summary
from spon_cli.command import command
from spon_cli.loading import quiet
from spon_cli.output import percent, show, show_json, show_table
from spon_plugin import Adapter, read_adapter
from spon_plugin.adapter.base import base_of
from spon_plugin.decoder.sites import linear_inputs

if TYPE_CHECKING:
    from spon_plugin.layers.kernel_report import KernelRow


@dataclass(frozen=True, kw_only=True)
class InspectOptions(options.JsonOptions):
    """Options of `spon inspect`."""

    adapter: options.AdapterDir
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Load the base and show which kernel runs each kind of linear here.")
    ] = False
    model: Annotated[str | None, typer.Option(help="The base model, if it is no longer where the adapter says.")] = None
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16, of the base; auto is what evaluation takes.")
    ] = "auto"
    trust_remote_code: options.TrustRemoteCode = False


@command
def inspect_command(given: InspectOptions) -> None:
    """Show an adapter: its sites, thresholds, norms of centres and alphas, and achieved sparsity.

    [dim]spon inspect spon50[/dim]

    [dim]spon inspect spon50 --kernels --model model-w4[/dim]
    """
    loaded = read_adapter(given.adapter)
    rows = module_rows(loaded)
    kernels = _kernels(given, loaded) if given.kernels else []
    if given.json:
        shown = {**summary(loaded), "calibration": loaded.fields.calibration}
        extra = {"kernels": [row._asdict() for row in kernels]} if given.kernels else {}
        show_json({**shown, "modules": [row._asdict() for row in rows], **extra})
        return
    for key, value in summary(loaded).items():
        show(f"{key:>14}  {value}")
    centers = ["center norm"] if loaded.center_modules else []
    cells = [
        [
            row.module,
            row.threshold if row.thresholds is None else f"{row.thresholds[0]:.4g} to {row.thresholds[1]:.4g}",
            *([row.center_norm] if centers else []),
            row.alpha_norm,
            percent(row.achieved_sparsity),
        ]
        for row in rows
    ]
    if kernels:
        show_kernels(kernels)
    show_table("Sparsified linears", ["module", "threshold", *centers, "alpha norm", "achieved sparsity"], cells)


def _kernels(given: InspectOptions, adapter: Adapter) -> list[KernelRow]:
    """Of the adapter's linears in its base, merged."""
    from spon_plugin.layers.kernel_report import kernel_rows
    from spon_transformers.loading import load_model

    quiet()
    base = given.model or base_of(adapter.peft, given.adapter)
    model = load_model(base, given.dtype, trust_remote_code=given.trust_remote_code, blocks=True)
    adapter.check_base(linear_inputs(model), base)
    return kernel_rows({path: model.get_submodule(path) for path in adapter.masks}, model.dtype)


class ModuleRow(NamedTuple):
    """One linear of an adapter.

    Attributes:
        module: its path.
        threshold: the threshold, or the mean of those per channel.
        thresholds: the smallest and the largest threshold per channel; None where there is one for all.
        center_norm: L2 norm of its centre; None without one.
        alpha_norm: L2 norm of its alpha; None without one.
        achieved_sparsity: as calibration measured it; None if it is not recorded.
    """

    module: str
    threshold: float
    thresholds: tuple[float, float] | None
    center_norm: float | None
    alpha_norm: float | None
    achieved_sparsity: float | None


def module_rows(adapter: Adapter) -> list[ModuleRow]:
    """One row per linear, block by block."""
    achieved = {}
    for name, site in adapter.fields.calibration.get("sites", {}).items():
        for path in site["modules"]:
            achieved[f"{name.rpartition('.')[0]}.{path}"] = site["achieved_sparsity"]
    return [
        ModuleRow(
            path,
            float(mask.threshold.mean()),
            (float(mask.threshold.min()), float(mask.threshold.max())) if mask.per_channel else None,
            None if mask.center is None else float(mask.center.norm()),
            None if mask.alpha is None else float(mask.alpha.norm()),
            achieved.get(path),
        )
        for path, mask in sorted(adapter.masks.items(), key=lambda item: _natural(item[0]))
    ]


def _natural(path: str) -> list[tuple[int, str]]:
    """Sorts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
