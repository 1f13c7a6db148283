# SPDX-License-Identifier: Apache-2.0
"""The rows of `comparison` as a table: records and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spon_plugin.sparsifiers import get_sparsifier
from spon_plugin.studies.comparison import DENSE, MEAN, OFF, ON, Key, by_key
from spon_plugin.studies.equal_bytes import Between
from spon_plugin.studies.evaluation import share_recovered
from spon_plugin.studies.quality import COMPARED, changes
from spon_plugin.studies.quality_tables import (
    HEADINGS,
    UNCERTAIN,
    flat_record,
    last_word_cells,
    last_word_columns,
    quality_cells,
)
from spon_plugin.studies.quality_tables import NOTES as QUALITY_NOTES
from spon_plugin.studies.tables import markdown_table, number

Row = Mapping[str, Any]

SHARES = ("of TEAL's gap", "at equal bytes")
"""The columns that follow every perplexity."""

NOTES = (
    "`masked`: the share of the linears' weights that the method leaves unused on the text, R-Sparse's less its "
    "factors; linears that it leaves dense count. `bytes saved`: the same, less what else the method reads "
    "(LaRoSA's residual adapter). `of TEAL's gap`: (TEAL - row) / (TEAL - dense), TEAL without alpha at the same "
    "target. `at equal bytes`: the same, TEAL where it saves as many bytes as the row does, between its own rows. "
    "`extra`: bytes beside the dense weights, a layer: thresholds, rotations, factors, and the bias that alpha "
    "folds into. `mean`: E[W x - method(x)] as a bias, not trained."
)


def alpha_title(alpha: str) -> str:
    """How tables call a row's alpha."""
    return {OFF: "off", MEAN: "mean, untrained", ON: "trained"}.get(alpha, f"trained, {alpha}")


def recovered(row: Row, rows: Sequence[Row], text: str) -> float | None:
    """The share of uniform TEAL's perplexity gap, at the row's target, that the row closes.

    Returns:
        None where there is no TEAL row, no gap, or the row is TEAL's.
    """
    dense, teal = _dense(rows), _teal(row, rows)
    if dense is None or teal is None:
        return None
    return share_recovered(*(r["texts"][text]["perplexity"] for r in (dense, teal, row)))


def recovered_at_equal_bytes(row: Row, rows: Sequence[Row], text: str) -> float | None:
    """The share of uniform TEAL's gap that the row closes at equal bytes (`equal_bytes`); None where that has none."""
    between = _between(row, rows, text)
    return None if between is None else between.share(row["texts"][text])


def share_cells(row: Row, rows: Sequence[Row], text: str) -> list[str]:
    """Both shares, where the difference in perplexity that they are of is certain."""
    shares = recovered(row, rows, text), recovered_at_equal_bytes(row, rows, text)
    certain = certain_change(row, rows, text), certain_at_equal_bytes(row, rows, text)
    return [
        "" if share is None else UNCERTAIN if sure is False else f"{share:.2f}"
        for share, sure in zip(shares, certain, strict=True)
    ]


def certain_change(row: Row, rows: Sequence[Row], text: str) -> bool | None:
    """Whether the row's perplexity differs from TEAL's at its target; None where rows do not say it (`changes`)."""
    teal = _teal(row, rows)
    if teal is None:
        return None
    before, after = (r["texts"][text].get("windows") or {} for r in (teal, row))
    change = changes(before, after).get("perplexity")
    return None if change is None else change.certain


def certain_at_equal_bytes(row: Row, rows: Sequence[Row], text: str) -> bool | None:
    """The same of what TEAL would have where it saves as many bytes, its two rows and the dense one drawn along."""
    between = _between(row, rows, text)
    return None if between is None else between.is_certain(row["texts"][text])


def _dense(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row["method"] == DENSE), None)


def _teal(row: Row, rows: Sequence[Row]) -> Row | None:
    """TEAL's row without alpha at the target of another row; None for that row itself."""
    found = next(
        (r for k, r in by_key(rows) if (k.method, k.sparsity, k.alpha) == ("teal", row["sparsity"], OFF)), None
    )
    return None if found is row else found


def _between(row: Row, rows: Sequence[Row], text: str) -> Between | None:
    """Where the row lies among TEAL's; None for TEAL's own."""
    if (row["method"], row["alpha"]) == ("teal", OFF):
        return None
    teal = [r["texts"][text] for k, r in by_key(rows) if (k.method, k.alpha) == ("teal", OFF)]
    return Between.of(row["texts"][text], (_dense(rows) or {"texts": {}})["texts"].get(text), teal)


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
                    **flat_record(result),
                    "of_teals_gap": recovered(row, rows, text),
                    "of_teals_gap_certain": certain_change(row, rows, text),
                    "of_teals_gap_at_equal_bytes": recovered_at_equal_bytes(row, rows, text),
                    "of_teals_gap_at_equal_bytes_certain": certain_at_equal_bytes(row, rows, text),
                    "masked": result["masked"],
                    "bytes_saved": result["saved"],
                    "extra_bytes_per_layer": row["extra_bytes_per_layer"],
                    "calibration_seconds": row["seconds"]["calibration"],
                    "training_seconds": row["seconds"].get("training"),
                    "lambada": row["last_word"]["accuracy"] if "last_word" in row else None,
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
        head += [f"{name} (dense {number(dense['texts'][name]['perplexity'])})", *SHARES]
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
    beside = [
        "## Beside the dense model",
        "",
        *markdown_table(quality_columns(rows), [quality_line(key, row, names) for key, row in ordered], text=3),
        "",
        QUALITY_NOTES,
    ]
    return "\n".join([*lines, "", f"{protocol} {NOTES}", *missing, "", *beside]) + "\n"


def quality_columns(rows: Sequence[Row]) -> list[str]:
    """Headings of the table of divergences."""
    dense = next(row for row in rows if row["method"] == DENSE)
    columns = [f"{name}: {title}" for name in dense["texts"] for title in ("perplexity", *HEADINGS)]
    return ["sparsity", "method", "alpha", *columns, *last_word_columns(dense)]


def quality_line(key: Key, row: Row, names: Sequence[str]) -> list[str]:
    """A line of it."""
    line = [f"{key.sparsity:.0%}", get_sparsifier(key.method).title, alpha_title(key.alpha)]
    for name in names:
        line += quality_cells(row["texts"][name], ("perplexity", *COMPARED))
    return [*line, *last_word_cells(row)]


def cells(key: Key, row: Row, rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """A line of the table."""
    line = [f"{key.sparsity:.0%}", get_sparsifier(key.method).title, alpha_title(key.alpha)]
    for name in names:
        line += [number(row["texts"][name]["perplexity"]), *share_cells(row, rows, name)]
    for field in ("masked", "saved"):
        line.append(f"{mean(result[field] for result in row['texts'].values()):.1%}")
    line.append(f"{row['extra_bytes_per_layer'] / 1000:.1f}")
    seconds = row["seconds"]
    return [*line, f"{seconds['calibration']:.0f}", f"{seconds['training']:.0f}" if "training" in seconds else ""]


def mean(values: Any) -> float:
    """The mean of some numbers."""
    numbers = list(values)
    return sum(numbers) / len(numbers)
