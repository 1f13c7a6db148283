# SPDX-License-Identifier: Apache-2.0
"""`spon eval`: perplexity of dense, TEAL and SPON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spon_cli import options
from spon_cli.evaluation_tables import against, as_json, show_baselines, show_evaluations
from spon_cli.loading import load
from spon_cli.output import progress_bars, show_json
from spon_plugin import read_adapter
from spon_plugin.calibration.text import leading_windows
from spon_plugin.decoder.sites import linear_inputs
from spon_plugin.studies.evaluation import PROTOCOLS, evaluate
from spon_transformers.precision import QUANTIZED, check_precision
from spon_transformers.text_sources import text_sources


def eval_command(
    model: options.Model,
    adapter: Annotated[Path, typer.Option(help="The adapter directory.")],
    baseline: Annotated[
        Path | None, typer.Option(help="Another adapter, whose masks alone are the yardstick: plain TEAL, say.")
    ] = None,
    text: options.Text = None,
    dataset: options.Dataset = None,
    window: options.Window = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each text to evaluate on, from its start.")] = 16384,
    protocol: Annotated[
        str, typer.Option(help="all-but-first: position 0 dense; last-half: TEAL's, first half of each window dense.")
    ] = "all-but-first",
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 4,
    dtype: options.Dtype = "auto",
    precision: Annotated[
        str | None, typer.Option(help="Quantize the linears: " + ", ".join(QUANTIZED) + "; the rest is in --dtype.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure the perplexity of the dense model, of its masks alone (TEAL) and with alpha (SPON).

    With several texts, each is measured for itself: report in-domain and out-of-domain side by side.

    [dim]spon eval ./model --adapter spon50 --text wiki.test.txt --window 512 --max-tokens 16384[/dim]

    [dim]spon eval ./model --adapter sensitivity50 --baseline teal50 --text wiki.test.txt[/dim]

    [dim]spon eval ./model --adapter spon50 --precision int4 --text wiki.test.txt[/dim]
    """
    options.check_choice("protocol", protocol, PROTOCOLS)
    if precision is not None:
        options.check_choice("precision", precision, QUANTIZED)
        check_precision(precision)
    loaded_adapter = read_adapter(adapter)
    yardstick = None if baseline is None else read_adapter(baseline).without_alpha()
    sources = text_sources(text, dataset, part="test")
    loaded = load(model, dtype, precision=precision)
    for given in (loaded_adapter, yardstick):
        if given is not None:
            given.check_base(linear_inputs(loaded.model), model)
    results, baselines = [], []
    with progress_bars() as stage:
        for source in sources:
            windows = leading_windows(loaded.tokenizer, source.text, window, max_tokens)
            common = loaded.sites, windows, protocol, batch_size
            result = evaluate(loaded.model, loaded_adapter, *common, stage(source.name))
            results.append(result)
            if yardstick is not None:
                known, bar = {"dense": result.perplexity["dense"]}, stage(f"{source.name}, baseline")
                baselines.append(evaluate(loaded.model, yardstick, *common, bar, known))
    if json:
        values = [as_json(source, result) for source, result in zip(sources, results, strict=True)]
        for value, result, other in zip(values, results, baselines, strict=False):
            value["baseline"] = {
                "perplexity": other.perplexity["teal"],
                "achieved": other.sparsity["achieved"],
                "recovered": against(other, result),
            }
        show_json(values[0] if len(values) == 1 else {"texts": values})
        return
    show_evaluations(sources, results)
    if baselines:
        show_baselines(sources, results, baselines)
