# SPDX-License-Identifier: Apache-2.0
"""`spon eval`: perplexity of dense, TEAL and SPON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from spon_cli import options
from spon_cli.calibrate import check_choice, load
from spon_cli.output import percent, progress_bars, show_json, show_table
from spon_cli.sources import TextSource, text_sources
from spon_plugin import read_adapter
from spon_plugin.evaluation import PROTOCOLS, Evaluation, evaluate
from spon_plugin.sites import linear_inputs
from spon_plugin.text import leading_windows


def eval_command(
    model: options.Model,
    adapter: Annotated[Path, typer.Option(help="The adapter directory.")],
    text: options.Text = None,
    dataset: options.Dataset = None,
    window: options.Window = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each text to evaluate on, from its start.")] = 16384,
    protocol: Annotated[
        str, typer.Option(help="all-but-first: position 0 dense; last-half: TEAL's, first half of each window dense.")
    ] = "all-but-first",
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 4,
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Measure the perplexity of the dense model, of its masks alone (TEAL) and with alpha (SPON).

    With several texts, each is measured for itself: report in-domain and out-of-domain side by side.

    [dim]spon eval ./model --adapter spon50 --text wiki.test.txt --window 512 --max-tokens 16384[/dim]
    """
    check_choice("protocol", protocol, PROTOCOLS)
    loaded_adapter = read_adapter(adapter)
    sources = text_sources(text, dataset, part="test")
    loaded = load(model, dtype)
    loaded_adapter.check_base(linear_inputs(loaded.model), model)
    results = []
    with progress_bars() as stage:
        for source in sources:
            windows = leading_windows(loaded.tokenizer, source.text, window, max_tokens)
            results.append(
                evaluate(loaded.model, loaded_adapter, loaded.sites, windows, protocol, batch_size, stage(source.name))
            )
    if json:
        values = [as_json(source, result) for source, result in zip(sources, results, strict=True)]
        show_json(values[0] if len(values) == 1 else {"texts": values})
        return
    show_evaluations(sources, results)


def as_json(source: TextSource, result: Evaluation) -> dict[str, Any]:
    """One text's measurement as a JSON object."""
    return {
        "text": source.name,
        "perplexity": result.perplexity,
        "recovered": result.recovered,
        "sparsity": result.sparsity,
        "protocol": result.protocol,
        "window": result.window,
        "tokens": result.tokens,
    }


def show_evaluations(sources: Sequence[TextSource], results: Sequence[Evaluation]) -> None:
    """Print one row per text."""
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
    show_table(
        f"Perplexity, windows of {first.window} tokens, {first.protocol}, target {percent(first.sparsity['target'])}",
        ["text", "dense", "TEAL", "SPON", "recovered", "achieved sparsity", "tokens"],
        rows,
        caption="recovered = (TEAL - SPON) / (TEAL - dense)",
    )
