# SPDX-License-Identifier: Apache-2.0
"""The rows of `comparison` as a table: records and Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from spon_plugin.sparsifiers import get_sparsifier
from spon_plugin.studies.comparison import DENSE, MEAN, OFF, ON, Key, by_key
from spon_plugin.studies.evaluation import share_recovered
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
    dense = next((r for r in rows if r["method"] == DENSE), None)
    teal = next((r for k, r in by_key(rows) if (k.method, k.sparsity, k.alpha) == ("teal", row["sparsity"], OFF)), None)
    if dense is None or teal is None or teal is row:
        return None
    return share_recovered(*(r["texts"][text]["perplexity"] for r in (dense, teal, row)))


def recovered_at_equal_bytes(row: Row, rows: Sequence[Row], text: str) -> float | None:
    """The share of uniform TEAL's gap that the row closes, TEAL taken where it saves as many bytes as the row does.

    The rows of one target do not save alike: trained alphas lift entries over the thresholds, other methods have other
    thresholds, and some read more than weights. TEAL's loss over the dense model, in nats, is nearly a power of the
    share that it saves, so it is interpolated between TEAL's rows as a straight line of logarithms, below the first
    along the first two.

    Returns:
        None where TEAL has fewer than two rows, saves less than this row in all of them, or has no gap.
    """
    dense = next((r["texts"][text]["perplexity"] for r in rows if r["method"] == DENSE), None)
    results = [r["texts"][text] for k, r in by_key(rows) if (k.method, k.alpha) == ("teal", OFF)]
    points = sorted(
        (math.log(r["saved"]), math.log(math.log(r["perplexity"] / dense)))
        for r in results
        if dense and r["perplexity"] and r["perplexity"] > dense and r["saved"] > 0
    )
    own = row["texts"][text]
    if dense is None or (row["method"], row["alpha"]) == ("teal", OFF) or len(points) < 2 or own["saved"] <= 0:
        return None
    at = math.log(own["saved"])
    if at > points[-1][0]:
        return None
    index = next(i for i in range(1, len(points)) if at <= points[i][0])
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    loss = math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    return share_recovered(dense, dense * math.exp(loss), own["perplexity"])


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
                    "of_teals_gap_at_equal_bytes": recovered_at_equal_bytes(row, rows, text),
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
    return "\n".join([*lines, "", f"{protocol} {NOTES}", *missing]) + "\n"


def cells(key: Key, row: Row, rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """A line of the table."""
    line = [f"{key.sparsity:.0%}", get_sparsifier(key.method).title, alpha_title(key.alpha)]
    for name in names:
        shares = recovered(row, rows, name), recovered_at_equal_bytes(row, rows, name)
        line += [number(row["texts"][name]["perplexity"]), *("" if s is None else f"{s:.2f}" for s in shares)]
    for field in ("masked", "saved"):
        line.append(f"{mean(result[field] for result in row['texts'].values()):.1%}")
    line.append(f"{row['extra_bytes_per_layer'] / 1000:.1f}")
    seconds = row["seconds"]
    return [*line, f"{seconds['calibration']:.0f}", f"{seconds['training']:.0f}" if "training" in seconds else ""]


def mean(values: Any) -> float:
    """The mean of some numbers."""
    numbers = list(values)
    return sum(numbers) / len(numbers)
