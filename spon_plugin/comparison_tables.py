# SPDX-License-Identifier: Apache-2.0
"""The rows of `comparison` as a table: records and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spon_plugin.comparison import DENSE, MEAN, OFF, ON, Key, by_key
from spon_plugin.evaluation import share_recovered
from spon_plugin.sparsifiers import get_sparsifier
from spon_plugin.tables import markdown_table

Row = Mapping[str, Any]

NOTES = (
    "`masked`: the share of the linears' weights that the method leaves unused on the text; linears that it leaves "
    "dense count. `bytes saved`: the same, less what the method reads besides (R-Sparse's factors, LaRoSA's residual "
    "adapter). `of TEAL's gap`: (TEAL - row) / (TEAL - dense), TEAL without alpha at the same target. `extra`: bytes "
    "beside the dense weights, a layer: thresholds, rotations, factors, and the bias that alpha folds into. "
    "`mean`: E[W x - method(x)] as a bias, not trained."
)


def alpha_title(alpha: str) -> str:
    """How tables call a row's alpha."""
    return {OFF: "off", MEAN: "mean, untrained", ON: "trained"}.get(alpha, f"trained, {alpha}")


def recovered(row: Row, rows: Sequence[Row], text: str) -> float | None:
    """The share of uniform TEAL's perplexity gap, at the row's target, that the row closes.

    Returns:
        None where there is no TEAL row, no gap, or the row is TEAL's.
    """
    dense = next((r for r in rows if r["method"] == DENSE), None)
    teal = next((r for k, r in by_key(rows) if (k.method, k.sparsity, k.alpha) == ("teal", row["sparsity"], OFF)), None)
    if dense is None or teal is None or teal is row:
        return None
    return share_recovered(*(r["texts"][text]["perplexity"] for r in (dense, teal, row)))


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One flat record per method, sparsity, alpha and text."""
    flat = []
    for key, row in by_key(rows):
        for text, result in row["texts"].items():
            flat.append(
                {
                    "method": key.method,
                    "sparsity": key.sparsity,
                    "alpha": key.alpha,
                    "text": text,
                    "perplexity": result["perplexity"],
                    "of_teals_gap": recovered(row, rows, text),
                    "masked": result["masked"],
                    "bytes_saved": result["saved"],
                    "extra_bytes_per_layer": row["extra_bytes_per_layer"],
                    "calibration_seconds": row["seconds"]["calibration"],
                    "training_seconds": row["seconds"].get("training"),
                    "tokens": result["tokens"],
                    "window": result["window"],
                }
            )
    return flat


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, with notes on its columns and on the rows that a method cannot give."""
    dense = next(row for row in rows if row["method"] == DENSE)
    names = list(dense["texts"])
    head = ["sparsity", "method", "alpha"]
    for name in names:
        head += [f"{name} (dense {_number(dense['texts'][name]['perplexity'])})", "of TEAL's gap"]
    head += ["masked", "bytes saved", "extra, kB a layer", "calibration, s", "training, s"]
    ordered = sorted(by_key(rows), key=lambda item: item[0].sparsity)
    lines = markdown_table(head, [cells(key, row, rows, names) for key, row in ordered], text=3)
    first = dense["texts"][names[0]]
    protocol = f"Windows of {first['window']} tokens, {first['tokens']} tokens of each text."
    skipped = dict.fromkeys(
        f"- {get_sparsifier(row['method']).title} at {row['sparsity']:.0%}: {row['skipped']}"
        for row in rows
        if "skipped" in row
    )
    missing = ["", "No row for:", "", *skipped] if skipped else []
    return "\n".join([*lines, "", f"{protocol} {NOTES}", *missing]) + "\n"


def cells(key: Key, row: Row, rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """A line of the table."""
    line = [f"{key.sparsity:.0%}", get_sparsifier(key.method).title, alpha_title(key.alpha)]
    for name in names:
        share = recovered(row, rows, name)
        line += [_number(row["texts"][name]["perplexity"]), "" if share is None else f"{share:.2f}"]
    for field in ("masked", "saved"):
        line.append(f"{mean(result[field] for result in row['texts'].values()):.1%}")
    line.append(f"{row['extra_bytes_per_layer'] / 1000:.1f}")
    seconds = row["seconds"]
    return [*line, f"{seconds['calibration']:.0f}", f"{seconds['training']:.0f}" if "training" in seconds else ""]


def mean(values: Any) -> float:
    """The mean of some numbers."""
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.2f}"
