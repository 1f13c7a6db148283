# SPDX-License-Identifier: Apache-2.0
"""Model cards: the README.md beside an adapter or a merged model, by which a hub and a stranger know what it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spon_cli.output import percent
from spon_plugin import Adapter
from spon_plugin.adapter.hub import is_hub_id
from spon_plugin.sparsifiers.calibrate import method_of
from spon_plugin.studies.evaluation import Evaluation
from spon_plugin.studies.tables import number
from spon_transformers.text_sources import TextSource

TAGS = ["spon", "activation-sparsity", "input-sparsification", "teal"]
_START, _END = "<!-- spon eval -->", "<!-- end -->"

Evaluations = Sequence[tuple[TextSource, Evaluation]]
"""Texts, and what `spon eval` measures on each."""


def adapter_card(adapter: Adapter, evaluations: Evaluations = ()) -> str:
    """The model card of an adapter: what it is, how it was made, what it recovers, how to use it.

    Args:
        adapter: with its config.
        evaluations: rows of its table; without any it says how to get them.
    """
    fields, calibration = adapter.fields, adapter.fields.calibration
    base = adapter.base_model
    training: Mapping[str, Any] = calibration.get("training", {})
    facts = [
        ("base model", f"{_named(base)}{f', weights {fields.base_digest[:12]}' if fields.base_digest else ''}"),
        ("target sparsity", percent(fields.sparsity)),
        ("achieved, on held-out tokens", percent(calibration.get("achieved_sparsity")) or "not measured"),
        ("method", method_of(fields)),
        ("masked linears", str(len(adapter.masks))),
        ("with an alpha", str(sum(mask.alpha is not None for mask in adapter.masks.values()))),
        ("tokens masked", fields.tokens + (f", the first {fields.dense_prefix} dense" if fields.dense_prefix else "")),
        ("calibrated on", _text(calibration)),
        ("trained on", _text(training) if training else "nothing: masks alone"),
        ("made with", f"spon-plugin {calibration.get('spon_plugin', '')}".strip()),
    ]
    lines = [
        *_front_matter("peft", base),
        f"# SPON adapter, {percent(fields.sparsity)} sparse",
        "",
        "Input sparsification with spontaneous neurons: small entries of each masked linear's input are zeroed, so",
        "that the matching weights need not be read, and a trained vector per linear, folded into its bias, wins",
        "quality back ([arXiv 2512.12744](https://arxiv.org/abs/2512.12744), [TEAL](https://arxiv.org/abs/2408.14690)).",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in facts),
        "",
        "## What it costs and recovers",
        "",
        *_evaluation_lines(evaluations),
        "",
        "## Use it",
        "",
        "```sh",
        'pip install "spon-plugin[peft]"',
        "vllm serve ADAPTER          # with spon-plugin[vllm]: this directory, or its id on the hub",
        "```",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(_name(base) or 'BASE')})",
        'model = PeftModel.from_pretrained(base, "ADAPTER")',
        "```",
        "",
        "## Licence",
        "",
        "The adapter is derived from its base model, whose licence applies.",
    ]
    return "\n".join(lines) + "\n"


def merged_card(adapter: Adapter, base: str) -> str:
    """The model card of a base model with an adapter merged into it."""
    lines = [
        *_front_matter("transformers", base),
        f"# {_named(base)}, merged with a SPON adapter, {percent(adapter.fields.sparsity)} sparse",
        "",
        "**It needs the package spon-plugin.** Without it transformers warns of an unknown quantization method and",
        "runs the model dense with biases that were made for the sparse one: wrong results.",
        "",
        f"The adapter: {method_of(adapter.fields)}, digest {adapter.digest[:12]}. The base model's licence applies.",
    ]
    return "\n".join(lines) + "\n"


def put_evaluations(file: Path, adapter: Adapter, evaluations: Evaluations) -> None:
    """Put the table into an adapter's card, in place of the one there; a card that has no place for it is made anew."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    table = "\n".join(_evaluation_lines(evaluations))
    text = _with_table(text, table) if _table_in(text) else adapter_card(adapter, evaluations)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def card_again(old: str, adapter: Adapter) -> str:
    """The card of an adapter that names its base model anew, with the table of its old card."""
    table = _table_in(old)
    return _with_table(adapter_card(adapter), table) if table else adapter_card(adapter)


def _table_in(text: str) -> str:
    start, end = text.find(_START), text.find(_END)
    return text[start : end + len(_END)] if 0 <= start < end else ""


def _with_table(text: str, table: str) -> str:
    return text.replace(_table_in(text), table)


def _front_matter(library: str, base: str | None) -> list[str]:
    """What a hub reads; JSON strings are YAML."""
    named = [f"base_model: {json.dumps(base)}"] if base and is_hub_id(base) else []
    kind = ["base_model_relation: adapter"] if named and library == "peft" else []
    tags = [f"  - {tag}" for tag in TAGS]
    return [
        "---",
        f"library_name: {library}",
        *named,
        *kind,
        "pipeline_tag: text-generation",
        "tags:",
        *tags,
        "---",
        "",
    ]


def _evaluation_lines(evaluations: Evaluations) -> list[str]:
    if not evaluations:
        return [_START, "Not measured yet: `spon eval BASE --adapter ADAPTER --text FILE --card`.", _END]
    rows = []
    for source, result in evaluations:
        shown = [result.perplexity["dense"], result.perplexity["teal"], result.perplexity.get("spon")]
        figures = ["" if value is None else number(value) for value in shown]
        rest = [percent(result.recovered) or "", percent(result.sparsity["achieved"]) or "", str(result.tokens)]
        rows.append(f"| {' | '.join([source.name.replace('|', ' '), str(result.window), *figures, *rest])} |")
    return [
        _START,
        f"Perplexity, protocol `{evaluations[0][1].protocol}`; recovered = (masks - SPON) / (masks - dense).",
        "",
        "| text | window | dense | masks alone | SPON | recovered | achieved sparsity | tokens |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *rows,
        _END,
    ]


def _text(source: Mapping[str, Any]) -> str:
    names = ", ".join(map(str, source.get("text", ()))) or "text"
    return f"{source['tokens']} tokens of {names}" if "tokens" in source else names


def _name(base: str | None) -> str:
    """A base as others may know it: not where it lies on this machine."""
    return base if base and is_hub_id(base) else Path(base).name if base else ""


def _named(base: str | None) -> str:
    return f"`{_name(base)}`" if base else "not named"
