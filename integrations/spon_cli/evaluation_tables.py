# SPDX-License-Identifier: Apache-2.0
"""What `spon eval` and `spon quickstart` measured, as JSON and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spon_cli.output import percent, show_table
from spon_plugin.studies.evaluation import Evaluation, share_recovered
from spon_transformers.text_sources import TextSource


def against(baseline: Evaluation, result: Evaluation) -> float | None:
    """The share of the baseline's gap that an adapter closes, with its alphas where it has some."""
    closed = result.perplexity.get("spon", result.perplexity["teal"])
    return share_recovered(result.perplexity["dense"], baseline.perplexity["teal"], closed)


def show_baselines(
    sources: Sequence[TextSource], results: Sequence[Evaluation], baselines: Sequence[Evaluation]
) -> None:
    """Print one row per text: the yardstick, and the share of its gap that the adapter closes."""
    rows = [
        [
            source.name,
            other.perplexity["teal"],
            percent(other.sparsity["achieved"]),
            percent(result.sparsity["achieved"]),
            percent(against(other, result)),
        ]
        for source, result, other in zip(sources, results, baselines, strict=True)
    ]
    show_table(
        "Against the masks of the baseline",
        ["text", "baseline", "its sparsity", "the adapter's", "recovered of its gap"],
        rows,
    )


def as_json(
    sources: Sequence[TextSource],
    results: Sequence[Evaluation],
    opening: str | None,
    baselines: Sequence[Evaluation] = (),
) -> list[dict[str, Any]]:
    """One JSON object per text, with what its windows begin with and what its baseline gave if there is one."""
    values: list[dict[str, Any]] = [
        {
            "text": source.name,
            "perplexity": result.perplexity,
            "recovered": result.recovered,
            "sparsity": result.sparsity,
            "protocol": result.protocol,
            "window": result.window,
            "windows_begin_with": opening,
            "tokens": result.tokens,
        }
        for source, result in zip(sources, results, strict=True)
    ]
    for value, result, other in zip(values, results, baselines, strict=False):
        value["baseline"] = {
            "perplexity": other.perplexity["teal"],
            "achieved": other.sparsity["achieved"],
            "recovered": against(other, result),
        }
    return values


def show_evaluations(sources: Sequence[TextSource], results: Sequence[Evaluation], opening: str | None) -> None:
    """Print one row per text; `opening` is what all windows begin with."""
    rows = [
        [
            source.name,
            *(result.perplexity.get(variant) for variant in ("dense", "teal", "spon")),
            percent(result.recovered),
            percent(result.sparsity["achieved"]),
            str(result.tokens),
        ]
        for source, result in zip(sources, results, strict=True)
    ]
    first = results[0]
    windows = f"windows of {first.window} tokens" + (f" after {opening}" if opening else "")
    show_table(
        f"Perplexity, {windows}, {first.protocol}, target {percent(first.sparsity['target'])}",
        ["text", "dense", "TEAL", "SPON", "recovered", "achieved sparsity", "tokens"],
        rows,
        caption="recovered = (TEAL - SPON) / (TEAL - dense)",
    )
