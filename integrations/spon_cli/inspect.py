# SPDX-License-Identifier: Apache-2.0
"""`spon inspect`: what is in an adapter."""

from __future__ import annotations

from spon_cli import options
from spon_cli.calibrate import summary
from spon_cli.output import out, percent, show_json, show_table
from spon_plugin import Adapter, read_adapter


def inspect_command(adapter: options.AdapterDir, json: options.Json = False) -> None:
    """Show an adapter: its sites, thresholds, alpha norms and achieved sparsity.

    [dim]spon inspect spon50[/dim]
    """
    loaded = read_adapter(adapter)
    rows = module_rows(loaded)
    if json:
        keys = ("module", "threshold", "alpha_norm", "achieved_sparsity")
        modules = [dict(zip(keys, row, strict=True)) for row in rows]
        show_json({**summary(loaded), "calibration": loaded.fields.calibration, "modules": modules})
        return
    for key, value in summary(loaded).items():
        out.print(f"{key:>14}  {value}")
    columns = ["module", "threshold", "alpha norm", "achieved sparsity"]
    show_table("Sparsified linears", columns, [[*row[:3], percent(row[3])] for row in rows])


def module_rows(adapter: Adapter) -> list[tuple[str, float, float | None, float | None]]:
    """Per linear: path, threshold, L2 norm of alpha (None without one), achieved sparsity (None if not recorded)."""
    achieved = {}
    for name, site in adapter.fields.calibration.get("sites", {}).items():
        for path in site["modules"]:
            achieved[f"{name.rpartition('.')[0]}.{path}"] = site["achieved_sparsity"]
    return [
        (
            path,
            float(threshold),
            float(adapter.alphas[path].norm()) if path in adapter.alphas else None,
            achieved.get(path),
        )
        for path, threshold in sorted(adapter.thresholds.items(), key=lambda item: _natural(item[0]))
    ]


def _natural(path: str) -> list[tuple[int, str]]:
    """Sorts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
