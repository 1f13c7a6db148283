# SPDX-License-Identifier: Apache-2.0
"""An adapter in a few figures: one JSON object, or a table of the sparsity it achieves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spon_cli.output import percent, show_table
from spon_plugin import Adapter
from spon_plugin.adapter.config import SponFields
from spon_plugin.sparsifiers.calibrate import method_of

if TYPE_CHECKING:
    from spon_plugin.layers.kernel_report import KernelRow


def summary(adapter: Adapter) -> dict[str, Any]:
    """An adapter in a few figures, for ``--json``."""
    fields: SponFields = adapter.fields
    return {
        "base_model": adapter.base_model,
        "digest": adapter.digest,
        "method": method_of(fields),
        "allocation": fields.allocation,
        "sparsity": {"target": fields.sparsity, "achieved": fields.calibration.get("achieved_sparsity")},
        "linears": len(adapter.masks),
        "per_channel": sum(mask.per_channel for mask in adapter.masks.values()),
        "centers": sum(mask.center is not None for mask in adapter.masks.values()),
        "alphas": sum(mask.alpha is not None for mask in adapter.masks.values()),
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
        f"Achieved sparsity on held-out tokens, target {percent(adapter.fields.sparsity)} ({method_of(adapter.fields)})"
    )
    show_table(title, ["site", "lowest block", "mean", "highest block"], rows)


def show_kernels(rows: Sequence[KernelRow]) -> None:
    """Print which kernel runs each kind of linear, and under the table why the faster ones do not."""
    columns = ["linears", "number", "weight", "in x out", "inputs", "one token", "many tokens"]
    cells = [
        [r.linears, str(r.number), r.format, f"{r.in_features} x {r.out_features}", r.dtype, r.kernel, r.many]
        for r in rows
    ]
    why = {f"{name}: {reason}": None for row in rows for name, reason in row.why_not.items()}
    caption = "Faster kernels do not run because:\n" + "\n".join(why) if why else None
    show_table("Kernels on this machine", columns, cells, caption)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
