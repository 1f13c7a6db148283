# SPDX-License-Identifier: Apache-2.0
"""The figures of `quality` as cells: each with its interval, and no difference where it is not certain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spon_plugin.studies.bootstrap import CONFIDENCE, FEWEST, Interval
from spon_plugin.studies.quality import COMPARED, METRICS, Change
from spon_plugin.studies.tables import number

HEADINGS = ["mean KL", "99% KL", "same top", "RMS Δp"]
UNCERTAIN = "uncertain"

NOTES = (
    "`mean KL`, `99% KL`: divergence from the reference, nats a token, its mean and 99th percentile. `same top`: share "
    "of tokens of which both have the same most likely one. `RMS Δp`: root mean square of the change of the text's "
    f"token's probability (llama.cpp's terms). In brackets {CONFIDENCE:.0%} confidence intervals by a bootstrap over "
    f"windows, from {FEWEST} on; a difference is `{UNCERTAIN}` where its own interval, of paired draws, holds zero or "
    "there is none."
)


def quality_cells(result: Mapping[str, Any], names: tuple[str, ...] = COMPARED) -> list[str]:
    """Figures of a row's result on a text, with their intervals; empty where they were not measured."""
    intervals = result.get("intervals") or {}
    return [with_interval(name, result.get(name), intervals.get(name)) for name in names]


def with_interval(name: str, value: float | None, ends: Interval | None) -> str:
    """A figure as ``0.31 [0.29, 0.34]``."""
    if value is None:
        return ""
    shown = _figure(name, value)
    return shown if ends is None else f"{shown} [{', '.join(_figure(name, end) for end in ends)}]"


def change_cells(found: Mapping[str, Change], names: tuple[str, ...]) -> list[str]:
    """Differences as ``-12.0% [-14.1%, -9.8%]``; empty where they were not made."""
    return [change_cell(name, found[name]) if name in found else "" for name in names]


def change_cell(name: str, change: Change) -> str:
    """One of them. Of perplexity it is a share of it; of shares and probabilities, of one hundred."""
    if not change.certain or change.ends is None:
        return UNCERTAIN
    shown = [_signed(name, value) for value in (change.value, *change.ends)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def last_word_columns(dense: Mapping[str, Any]) -> list[str]:
    """The heading over `last_word_cells`, with what the dense model's row has; none where it has none."""
    return [f"LAMBADA (dense {last_word_cells(dense)[0]})"] if "last_word" in dense else []


def last_word_cells(row: Mapping[str, Any]) -> list[str]:
    """The share of last words that a row's model gets right, with its interval; nothing where it was not asked."""
    found = row.get("last_word")
    return [] if found is None else [with_interval("same_top", found["accuracy"], found["interval"])]


def change_record(change: Change | None) -> dict[str, Any] | None:
    """A difference for JSON; None for none."""
    if change is None:
        return None
    return {"value": change.value, "interval": change.ends, "certain": change.certain}


def flat_record(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures with the ends of their intervals, for CSV: the same names whether or not they were measured."""
    intervals = result.get("intervals") or {}
    flat: dict[str, Any] = {}
    for name in (*METRICS, "kl_99"):
        low, high = intervals.get(name) or (None, None)
        flat |= {name: result.get(name), f"{name}_low": low, f"{name}_high": high}
    return flat


def _figure(name: str, value: float) -> str:
    if name == "perplexity":
        return number(value)
    return f"{value:.1%}" if name in ("same_top", "rms_dp") else f"{value:.3g}"


def _signed(name: str, value: float) -> str:
    return f"{value:+.3g}" if name == "kl" else f"{value:+.1%}"
