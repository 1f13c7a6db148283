# SPDX-License-Identifier: Apache-2.0
"""The rows of a study as a table: records and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spon_plugin.studies.ablation import DENSE
from spon_plugin.studies.evaluation import share_recovered
from spon_plugin.studies.plan import Point, Study
from spon_plugin.studies.tables import markdown_table, number

Rows = Mapping[str, Mapping[str, Any]]


def recovered(point: Point, rows: Rows, test: str) -> float | None:
    """The share of the gap that alpha closes, against the same masks alone; None for masks alone."""
    if not point.trial.carriers:
        return None
    names = (DENSE, point.trial.masks.name, point.trial.name)
    return share_recovered(*(rows[name]["tests"][test]["perplexity"] for name in names))


def records(study: Study, rows: Rows) -> list[dict[str, Any]]:
    """One flat record per point and test text."""
    flat = []
    for point in study.points:
        row, masks = rows[point.trial.name], rows[point.trial.masks.name]
        for test, result in row["tests"].items():
            flat.append(
                {
                    "study": study.name,
                    "series": point.series,
                    study.axis: point.label,
                    "test": test,
                    "dense": rows[DENSE]["tests"][test]["perplexity"],
                    "masks_alone": masks["tests"][test]["perplexity"],
                    "perplexity": result["perplexity"],
                    "recovered": recovered(point, rows, test),
                    "masked": result["masked"],
                    "sparsity": row["sparsity"],
                    "linears_with_alpha": len(row["carriers"]),
                    "training_tokens": row.get("training_tokens", 0),
                    "training_seconds": row["seconds"].get("training"),
                    "row": point.trial.name,
                }
            )
    return flat


def columns(study: Study, rows: Rows) -> list[str]:
    """Headings of the table."""
    head = [study.axis, "series"]
    for test, result in rows[DENSE]["tests"].items():
        head += [f"{test} (dense {number(result['perplexity'])})", "masks alone", "recovered"]
    return [*head, "masked", "train, s"]


def cells(point: Point, rows: Rows) -> list[str]:
    """A line of the table."""
    row, masks = rows[point.trial.name], rows[point.trial.masks.name]
    line = [point.label, point.series]
    for test, result in row["tests"].items():
        share = recovered(point, rows, test)
        line += [number(result["perplexity"]), number(masks["tests"][test]["perplexity"])]
        line.append("" if share is None else f"{share:.2f}")
    masked = [result["masked"] for result in row["tests"].values()]
    seconds = row["seconds"].get("training")
    return [*line, f"{sum(masked) / len(masked):.1%}", "" if seconds is None else f"{seconds:.0f}"]


def markdown(study: Study, rows: Rows) -> str:
    """The study as a Markdown table under its title."""
    head = columns(study, rows)
    lines = [f"## {study.title}", "", *markdown_table(head, [cells(point, rows) for point in study.points], text=2)]
    first = next(iter(rows[DENSE]["tests"].values()))
    lines += ["", f"Windows of {first['window']} tokens, {first['tokens']} tokens of each text. {NOTES}", ""]
    return "\n".join(lines)


NOTES = (
    "`recovered`: (masks alone - row) / (masks alone - dense), of perplexities, with the same masks. `masked`: the "
    "share of the linears' weights that go unused on the test texts."
)
