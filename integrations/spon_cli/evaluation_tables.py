# SPDX-License-Identifier: Apache-2.0
"""What `spon eval` and `spon quickstart` measured, as JSON and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spon_cli.output import percent, show_table
from spon_plugin.studies.evaluation import Evaluation, share_recovered
from spon_plugin.studies.last_word import LastWords, change
from spon_plugin.studies.quality import COMPARED
from spon_plugin.studies.quality_tables import (
    HEADINGS,
    NOTES,
    UNCERTAIN,
    change_cell,
    change_cells,
    change_record,
    quality_cells,
    with_interval,
)
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
    reference: str = "dense",
) -> list[dict[str, Any]]:
    """One JSON object per text, with what its windows begin with and what its baseline gave if there is one.

    Args:
        sources: the texts.
        results: of each.
        opening: what their windows begin with.
        baselines: of each, if there are any.
        reference: what the results were compared with.
    """
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
            "reference": reference,
            "quality": {variant: found.figures() for variant, found in result.quality.items()},
            "changes": {name: change_record(change) for name, change in result.changes().items()},
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
            recovered(result),
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


def recovered(result: Evaluation) -> str | None:
    """The share that alpha recovers, unless its difference to the masks alone is not certain."""
    change = result.changes().get("perplexity")
    return percent(result.recovered) if change is None or change.certain else UNCERTAIN


def show_quality(
    sources: Sequence[TextSource], results: Sequence[Evaluation], reference: str = "the dense model"
) -> None:
    """Print how far every model is from the reference, and what alpha changes of it; one row per text and model."""
    names = ("perplexity", *COMPARED)
    rows = []
    for source, result in zip(sources, results, strict=True):
        for variant, quality in result.quality.items():
            shown = quality_cells(quality.figures(), names)
            rows.append([source.name, variant if variant == "dense" else variant.upper(), *shown])
        if result.changes():
            rows.append([source.name, "alpha's change", *change_cells(result.changes(), names)])
    show_table(f"Beside {reference}", ["text", "model", "perplexity", *HEADINGS], rows, caption=NOTES)


def show_last_words(guessed: Mapping[str, LastWords]) -> None:
    """Print the share of last words that every model gets right, and whether alpha changes it."""
    shares = {name: with_interval("same_top", found.accuracy, found.ends) for name, found in guessed.items()}
    rows = [[name if name == "dense" else name.upper(), shown] for name, shown in shares.items()]
    if "spon" in guessed:
        rows.append(["alpha's change", change_cell("same_top", change(guessed["teal"].right, guessed["spon"].right))])
    count = len(guessed["dense"].right)
    show_table("LAMBADA", ["model", "accuracy"], rows, caption=f"Last words of {count} passages, greedy.")
