# SPDX-License-Identifier: Apache-2.0
"""`spon eval`: perplexity of dense, TEAL and SPON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from spon_cli import options
from spon_cli.command import Between, command
from spon_cli.drafts import draft_numbers, drafts_record, show_drafts
from spon_cli.evaluation_tables import as_json, show_baselines, show_evaluations, show_last_words, show_quality
from spon_cli.model_card import put_evaluations
from spon_cli.output import show_json
from spon_cli.progress import progress_bars
from spon_plugin import SponError, read_adapter
from spon_plugin.adapter.base import base_digest
from spon_plugin.adapter.directory import is_adapter
from spon_plugin.adapter.hub import CARD_NAME
from spon_plugin.decoder.masked_linears import MaskedLinears
from spon_plugin.decoder.sites import linear_inputs
from spon_plugin.studies.acceptance import acceptance
from spon_plugin.studies.evaluation import ALL, PROTOCOLS, evaluate_last_words, evaluate_variants
from spon_plugin.studies.quality import Reference
from spon_transformers.draft_costs import step_costs
from spon_transformers.lossless import check_view
from spon_transformers.precision import QUANTIZED, check_precision
from spon_transformers.text_sources import TextSource


@dataclass(frozen=True, kw_only=True)
class EvalOptions(options.ModelOptions, options.TextOptions, options.LastWordOptions, options.JsonOptions):
    """Options of `spon eval`."""

    adapter: options.AdapterOption
    baseline: Annotated[
        Path | None, typer.Option(help="Another adapter, whose masks alone are the yardstick: plain TEAL, say.")
    ] = None
    reference: Annotated[
        str | None,
        typer.Option(
            help="Another MODEL with the same tokenizer, from which KL and the like are measured, as the one before "
            "quantization.",
            show_default="the dense model",
        ),
    ] = None
    window: options.Window = 512
    max_tokens: Annotated[
        int, typer.Option(help="Tokens of each text to evaluate on, from its start."), Between(1, options.MANY)
    ] = 16384
    protocol: Annotated[
        str, typer.Option(help="all: as the adapter has it; last-half: TEAL's, first half of each window dense.")
    ] = ALL
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass."), Between(1, options.MANY)] = 4
    card: Annotated[
        bool, typer.Option("--card", help="Put the table into the model card (README.md) of the adapter, too.")
    ] = False
    drafts: Annotated[
        str | None,
        typer.Option(
            help="As 1,2,3,4,5: the share of drafted tokens that the dense model accepts, and the speed-up of lossless "
            "generation to expect at these numbers of drafts, from steps that are timed here."
        ),
    ] = None
    precision: Annotated[
        str | None, typer.Option(help="Quantize the linears: " + ", ".join(QUANTIZED) + "; the rest is in --dtype.")
    ] = None


@command
def eval_command(given: EvalOptions) -> None:
    """Measure the perplexity of the dense model, of its masks alone (TEAL) and with alpha (SPON).

    And how far from the dense model's their predictions are, in the terms of llama.cpp: mean and 99th-percentile KL,
    share of the same top token, root mean square of the change of the right token's probability; with confidence
    intervals.

    With several texts, each is measured for itself: report in-domain and out-of-domain side by side.

    [dim]spon eval ./model --adapter spon50 --text wiki.test.txt --window 512 --max-tokens 16384[/dim]

    [dim]spon eval ./model --adapter sensitivity50 --baseline teal50 --text wiki.test.txt[/dim]

    [dim]spon eval ./model --adapter spon50 --precision int4 --reference ./model --text wiki.test.txt[/dim]

    [dim]spon eval ./model --adapter spon50 --drafts 1,2,3,4,5 --text wiki.test.txt[/dim]
    """
    drafts = draft_numbers(given.drafts, given.window)
    options.check_choice("protocol", given.protocol, PROTOCOLS)
    if given.precision is not None:
        options.check_choice("precision", given.precision, QUANTIZED)
        check_precision(given.precision)
    if given.card and not is_adapter(given.adapter):
        raise SponError.of("adapter", str(given.adapter), "with --card, a directory")
    adapter = read_adapter(given.adapter)
    adapter.check_masks_alone("spon eval")
    yardstick = None if given.baseline is None else read_adapter(given.baseline).without_alpha()
    sources, passages = given.sources("test"), given.last_word_texts()
    references = _references(given, sources)
    loaded = given.load(precision=given.precision)
    for tried in (adapter, yardstick):
        if tried is not None:
            tried.check_base(linear_inputs(loaded.model), given.model, base_digest(loaded.model))
    if drafts:
        check_view(loaded.model, adapter)
    results, baselines, accepted = [], [], []
    with progress_bars() as stage:
        for source in sources:
            windows = loaded.leading_windows(source, given.window, given.max_tokens)
            common = windows, given.protocol, given.batch_size
            reference = references.get(source.name)
            if reference is not None and not torch.equal(reference.windows, windows):
                raise SponError.of("reference", given.reference, "a model with the same tokenizer")
            result = evaluate_variants(loaded.model, adapter, *common, stage(source.name), reference=reference)
            results.append(result)
            if yardstick is not None:
                known, bar = {"dense": result.perplexity["dense"]}, stage(f"{source.name}, baseline")
                baselines.append(evaluate_variants(loaded.model, yardstick, *common, bar, known, reference))
            if drafts:
                masks = MaskedLinears.of(loaded.model, adapter.masks, adapter.fields.dense_prefix)
                bar = stage(f"{source.name}, drafts")
                accepted.append(acceptance(loaded.model, masks, windows, drafts, bar, alphas=masks.alphas))
        guessed = evaluate_last_words(loaded.model, adapter, loaded.encoded(passages), stage=stage) if passages else {}
        if drafts:
            stage("Timing the steps")
            costs = step_costs(loaded.model, adapter, windows[:1], drafts)  # the last use of the model: it changes it
    if given.card:
        put_evaluations(given.adapter / CARD_NAME, adapter, list(zip(sources, results, strict=True)))
    if given.json:
        values = as_json(sources, results, loaded.opening, baselines, given.reference or "dense")
        for record, measured in zip(values, accepted, strict=False):
            record["lossless"] = drafts_record(measured, costs)
        words = {"last_word": {name: found.figures() for name, found in guessed.items()}} if guessed else {}
        show_json({**(values[0] if len(values) == 1 else {"texts": values}), **words})
        return
    show_evaluations(sources, results, loaded.opening)
    show_quality(sources, results, given.reference or "the dense model")
    if guessed:
        show_last_words(guessed)
    if baselines:
        show_baselines(sources, results, baselines)
    if drafts:
        show_drafts(sources, accepted, costs)


def _references(given: EvalOptions, sources: Sequence[TextSource]) -> dict[str, Reference]:
    """What the reference model, if another one was named, makes of each text; the model itself is not kept."""
    if given.reference is None:
        return {}
    loaded = given.load(base=given.reference)
    found = {}
    with progress_bars() as stage:
        for source in sources:
            windows = loaded.leading_windows(source, given.window, given.max_tokens)
            found[source.name] = Reference(loaded.model, windows, given.batch_size, stage(f"{source.name}, reference"))
    return found
