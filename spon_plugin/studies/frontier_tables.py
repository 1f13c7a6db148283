# SPDX-License-Identifier: Apache-2.0
"""The rows of `frontier` as tables: all of them, what lies on the hull, and who wins where bytes are equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from spon_plugin.studies.comparison import OFF
from spon_plugin.studies.quality import COMPARED, Change, changes
from spon_plugin.studies.quality_tables import (
    HEADINGS,
    NOTES,
    change_cells,
    flat_record,
    last_word_cells,
    quality_cells,
)
from spon_plugin.studies.tables import markdown_table, number

Row = Mapping[str, Any]

_NOTHING = 1e-6  # a divergence that is rounding

EQUAL = 0.05
"""Rows whose bytes differ by no more than this share of them are taken to read as many."""

FRONTIER_NOTES = (
    "`bits a weight`: what a generated token reads, in bits for each weight that it multiplies by: codes of rows that "
    "are not skipped, scales, output head, norms, thresholds and biases; embeddings only where they are the head. "
    "Formats: bf16; int8 with a scale for each output, int4 with one for each output and group of inputs, rounded as "
    "`spon quantize` does, their head in int8; with -fit for the inputs that the row's own masks leave; int3 likewise, "
    "for comparison, as nothing here runs it; gguf: by llama.cpp's quantizer without an importance matrix. Masks "
    "and alphas are made on bf16; a name after the sparsity is an adapter's that was given. "
    "`hull`: no row, and no mix of two, is better for as many bytes."
)


def label(row: Row) -> str:
    """A row in a few words."""
    if not row["sparsity"]:
        return f"{row['format']}"
    if row.get("adapter"):
        return f"{row['format']} {row['sparsity']:.0%}, {row['adapter']}"
    return f"{row['format']} {row['sparsity']:.0%}" + (" + alpha" if row["alpha"] != OFF else "")


def points(rows: Sequence[Row], text: str, figure: str = "perplexity") -> list[tuple[float, float, Row]]:
    """Bits and logarithm of a figure, `perplexity` or `kl`, of every row where it is above nothing, by bits."""
    found = [
        (row["bits_per_weight"], math.log(row["texts"][text][figure]), row)
        for row in rows
        if (row["texts"][text].get(figure) or 0) > _NOTHING
    ]
    return sorted(found, key=lambda point: point[:2])


def hull(rows: Sequence[Row], text: str, figure: str = "perplexity") -> list[Row]:
    """The rows on the lower convex hull of bits and the logarithm of a figure, from the fewest bits to the best."""
    kept: list[tuple[float, float, Row]] = []
    for point in points(rows, text, figure):
        if kept and point[1] >= kept[-1][1]:
            continue  # more bits for nothing
        while len(kept) > 1 and _above(kept[-2], kept[-1], point):
            kept.pop()
        kept.append(point)
    return [row for _, _, row in kept]


def _above(first: tuple[float, float, Row], middle: tuple[float, float, Row], last: tuple[float, float, Row]) -> bool:
    """Whether `middle` lies on or above the line from `first` to `last`."""
    share = (middle[0] - first[0]) / (last[0] - first[0])
    return middle[1] >= first[1] + share * (last[1] - first[1])


def equal_bytes(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pairs of rows of different formats that read as many bytes, the one with fewer bits a stored weight second."""
    pairs = []
    for first, second in combinations(rows, 2):
        sizes = first["bytes_per_token"], second["bytes_per_token"]
        if first["format"] != second["format"] and abs(sizes[0] - sizes[1]) <= EQUAL * min(sizes):
            ordered = sorted((first, second), key=lambda row: -row["bytes_dense"])
            pairs.append((ordered[0], ordered[1]))
    return pairs


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One flat record per row and text."""
    flat = []
    for text in rows[0]["texts"] if rows else ():
        on_hull = [id(row) for row in hull(rows, text)]
        for row in rows:
            result = row["texts"][text]
            flat.append(
                {
                    **{
                        name: row[name]
                        for name in ("format", "sparsity", "alpha", "bits_per_weight", "bytes_per_token")
                    },
                    "adapter": row.get("adapter", ""),
                    "text": text,
                    **flat_record(result),
                    "masked": result.get("masked"),
                    "on_hull": id(row) in on_hull,
                    "lambada": row["last_word"]["accuracy"] if "last_word" in row else None,
                    "tokens": result["tokens"],
                    "window": result["window"],
                    "evaluation_seconds": row["seconds"]["evaluation"],
                    "adapter_seconds": row["seconds"].get("adapter"),
                }
            )
    return flat


def columns(rows: Sequence[Row]) -> list[str]:
    """Headings of the table of all rows."""
    head = ["weights", "bits a weight", "MB a token", "masked"]
    for text in rows[0]["texts"]:
        head += [f"{text}: {title}" for title in ("perplexity", *HEADINGS, "hull")]
    return [*head, *(["LAMBADA"] if "last_word" in rows[0] else [])]


def line(row: Row, rows: Sequence[Row]) -> list[str]:
    """A line of it."""
    masked = [result["masked"] for result in row["texts"].values() if result.get("masked") is not None]
    cells = [label(row), f"{row['bits_per_weight']:.2f}", f"{row['bytes_per_token'] / 1e6:.1f}"]
    cells.append(f"{sum(masked) / len(masked):.1%}" if masked else "")
    for text, result in row["texts"].items():
        on_hull = any(other is row for other in hull(rows, text))
        cells += [*quality_cells(result, ("perplexity", *COMPARED)), "yes" if on_hull else ""]
    return [*cells, *last_word_cells(row)]


def pair_columns() -> list[str]:
    """Headings of the table of pairs."""
    return [
        "more bits, fewer rows",
        "fewer bits, more rows",
        "text",
        "bits a weight",
        "perplexity",
        *HEADINGS[:1],
        *HEADINGS[2:],
    ]


def pair_lines(rows: Sequence[Row]) -> list[list[str]]:
    """How the second of each pair of `equal_bytes` differs from the first, where that is certain."""
    names = ("perplexity", *(name for name in COMPARED if name != "kl_99"))
    lines = []
    for first, second in equal_bytes(rows):
        for text in first["texts"]:
            bits = " and ".join(f"{row['bits_per_weight']:.2f}" for row in (first, second))
            lines.append([label(first), label(second), text, bits, *change_cells(_changes(first, second, text), names)])
    return lines


def _changes(first: Row, second: Row, text: str) -> dict[str, Change]:
    before, after = (row["texts"][text].get("windows") or {} for row in (first, second))
    return changes(before, after)


def markdown(rows: Sequence[Row]) -> str:
    """Both tables, with notes."""
    first = next(iter(rows[0]["texts"].values()))
    ordered = sorted(rows, key=lambda row: -row["bits_per_weight"])
    lines = [
        *markdown_table(columns(rows), [line(row, rows) for row in ordered]),
        "",
        f"Windows of {first['window']} tokens, {first['tokens']} tokens of each text. {FRONTIER_NOTES} {NOTES}",
    ]
    pairs = pair_lines(ordered)
    if pairs:
        title = f"## Where as many bytes are read, within {EQUAL:.0%}"
        says = "How the row with fewer bits a stored weight differs from the one with more."
        lines += ["", title, "", *markdown_table(pair_columns(), pairs, text=3), "", says]
    return "\n".join(lines) + "\n"


def in_words(row: Row) -> str:
    """A row that was just measured."""
    shown = ", ".join(f"{name} {number(result['perplexity'])}" for name, result in row["texts"].items())
    return f"{label(row)}: {row['bits_per_weight']:.2f} bits a weight, {shown}, {row['seconds']['evaluation']:.0f} s"
