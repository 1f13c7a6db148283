# SPDX-License-Identifier: Apache-2.0
"""Lossless generation on a real model: is every token the dense model's, how many drafts are accepted, what it costs.

    python -m benchmarks.lossless MODEL --adapter ADAPTER --text FILE --prompts 8 --drafts 1,2,3 --json OUT.json
    python -m benchmarks.lossless MODEL --adapter ADAPTER --text FILE --tokens 12 --drafts 2 --equality --json ALL.json

Each prompt is continued greedily by the dense model as transformers loads it (once, before the weights are laid out
anew), then, by turns, by the dense model on rows, by the sparse one, and by the dense one with drafts of the sparse one
in the numbers asked for. ``--first`` and ``--prompts`` cut the work into parts, which ``--add`` puts together. Where a
text parts from the dense model's, the gap between the two best logits there says whether they were equal in rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from spon_plugin import machine
from spon_transformers import sparse_view

PLAIN, DENSE, SPARSE = "dense, as loaded", "dense, on rows", "sparse"


def continued(model: Any, prompt: Tensor, tokens: int, **more: Any) -> tuple[Tensor, float]:
    """The greedy continuation of a prompt, and the seconds that it took."""
    settings = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
    start = time.perf_counter()
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings, **more)
    return text[0, prompt.shape[1] :], time.perf_counter() - start


class Rounds:
    """Counts the passes of a model that verify drafts, while it is asked to."""

    def __init__(self, model: Any) -> None:
        self.passes = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, *_arguments: Any) -> None:
        self.passes += 1


@torch.no_grad()
def gap(model: Any, prompt: Tensor, text: Tensor, other: Tensor) -> dict[str, Any]:
    """Where two continuations part: the position, and how far the dense model's logits of the two tokens are apart."""
    at = int((text != other).nonzero()[0])
    logits = model(torch.cat([prompt[0], text[:at]])[None]).logits[0, -1].float()
    return {"at": at, "logits_apart": abs(float(logits[text[at]] - logits[other[at]]))}


def run(
    model: Any, adapter: str, prompts: Sequence[Tensor], tokens: int, drafts: Sequence[int], equality: bool
) -> Iterator[dict[str, Any]]:
    """A record for every prompt: seconds of each variant, rounds, and where a text is not the dense model's."""
    plain: list[tuple[Tensor, float] | None] = [None] * len(prompts)
    if not equality:
        continued(model, prompts[0], 4)
        plain = [continued(model, prompt, tokens) for prompt in prompts]
    view = sparse_view(model, adapter)
    rounds = Rounds(model)
    for each in (model, view):
        continued(each, prompts[0], 4)
    for prompt, loaded in zip(prompts, plain, strict=True):
        record: dict[str, Any] = {"seconds": {}, "rounds": {}, "differs": {}}
        if loaded is not None:
            text, record["seconds"][PLAIN] = loaded
        own, record["seconds"][DENSE] = continued(model, prompt, tokens)
        if loaded is not None:
            _, record["seconds"][SPARSE] = continued(view, prompt, tokens)
            if not torch.equal(own, text):
                record["differs"][PLAIN] = gap(model, prompt, own, text)
        for number in drafts:
            view.generation_config.num_assistant_tokens, rounds.passes = number, 0
            drafted, record["seconds"][name(number)] = continued(model, prompt, tokens, assistant_model=view)
            record["rounds"][name(number)] = rounds.passes
            if not torch.equal(drafted, own):
                record["differs"][name(number)] = gap(model, prompt, own, drafted)
        print({key: round(tokens / value, 1) for key, value in record["seconds"].items()}, flush=True)
        yield record


def name(drafts: int) -> str:
    """What a variant is called."""
    return f"{drafts} drafted"


def summary(records: Sequence[Mapping[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """A row for every variant: tokens per second, tokens a round and accepted share, texts that differ."""
    rows = []
    for variant in records[0]["seconds"]:
        rounds = [record["rounds"].get(variant) for record in records]
        row: dict[str, Any] = {
            "name": variant,
            "tokens_per_second": tokens / statistics.median(record["seconds"][variant] for record in records),
            "equal_texts": sum(variant not in record["differs"] for record in records),
            "differs": [record["differs"][variant] for record in records if variant in record["differs"]],
        }
        if rounds[0] is not None:
            # Every round gives one token of the dense model's own; the rest were drafted and accepted. A last round may
            # draft fewer.
            row["tokens_a_round"] = tokens * len(records) / sum(rounds)
            row["accepted"] = (row["tokens_a_round"] - 1) / int(variant.split()[0])
        rows.append(row)
    for row in rows:
        if row["name"] == SPARSE:  # its text is another
            row["equal_texts"] = None
    return rows


def table(rows: Sequence[Mapping[str, Any]], count: int) -> str:
    """The rows in Markdown."""
    lines = ["| model | tokens/s | tokens a round | drafts accepted | texts equal | largest gap where not |"]
    lines.append("| --- |" + " ---: |" * 5)
    for row in rows:
        round_ = f"{row['tokens_a_round']:.2f} | {row['accepted']:.0%}" if "accepted" in row else "|"
        equal = "" if row["equal_texts"] is None else f"{row['equal_texts']} of {count}"
        apart = max((found["logits_apart"] for found in row["differs"]), default=None)
        largest = "" if apart is None else f"{apart:.1e}"
        lines.append(f"| {row['name']} | {row['tokens_per_second']:.1f} | {round_} | {equal} | {largest} |")
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory or hub name")
    parser.add_argument("--adapter", required=True, help="its adapter")
    parser.add_argument("--text", type=Path, required=True, help="where prompts come from")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt")
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="generated from each")
    parser.add_argument("--drafts", default="1,2,3")
    parser.add_argument("--equality", action="store_true", help="only the dense model on rows, and drafts")
    parser.add_argument("--dtype", default="float32", choices=list(machine.DTYPES))
    parser.add_argument("--json", type=Path, help="write the records and their summary there")
    parser.add_argument("--add", action="store_true", help="to those that are there")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=machine.DTYPES[arguments.dtype]).eval()
    last = arguments.first + arguments.prompts
    size = 4 * arguments.length  # of a prompt's place in the text, so that no two are neighbours
    ids = tokenizer(arguments.text.read_text()[: 8 * size * last], return_tensors="pt").input_ids[0]
    if len(ids) < size * last:
        parser.error(f"--text {arguments.text}: {len(ids)} tokens, expected {size * last}")
    prompts = [ids[size * i : size * i + arguments.length][None] for i in range(arguments.first, last)]
    drafts = [int(number) for number in arguments.drafts.split(",")]
    records: list[dict[str, Any]] = []
    if arguments.add and arguments.json.exists():
        records = json.loads(arguments.json.read_text())["records"]
    device = machine.device_name(model.device)
    result = {"model": Path(arguments.model).name, "device": device, "torch": torch.__version__}
    result |= {"machine": machine.description(), "transformers": transformers.__version__, "dtype": arguments.dtype}
    result |= {"length": arguments.length, "tokens": arguments.tokens}
    for record in run(model, arguments.adapter, prompts, arguments.tokens, drafts, arguments.equality):
        records.append(record)
        rows = summary(records, arguments.tokens)
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps({**result, "rows": rows, "records": records}, indent=1) + "\n")
    title = f"{result['model']}, {result['device']}, {result['machine']}, {arguments.dtype}"
    print(f"{title}, {len(records)} prompts, {arguments.tokens} tokens each\n\n{table(rows, len(records))}")


if __name__ == "__main__":
    main()
