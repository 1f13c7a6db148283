# SPDX-License-Identifier: Apache-2.0
"""How far one masked model is from itself where only the rounding of its sums differs.

    python -m benchmarks.rounding MODEL --adapter ADAPTER --text wikitext2.txt
    python -m benchmarks.rounding MODEL --adapter A25 --adapter A50 --text wikitext2.txt --json FILE

A hard mask is a step: an input that rounding moves across its threshold is there or is not, the next layer's inputs
move by more than the rounding did, and more of them cross. Each model runs in float32 and in `--dtype`, with the same
masks on the same windows. `to itself` is the mean divergence between these two, `to dense` that of the first from the
dense model: what the masks cost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from spon_plugin import read_adapter
from spon_plugin.adapter.adapter import Adapter
from spon_plugin.calibration.text import leading_windows, read_text
from spon_plugin.decoder.masked_linears import sparse_inputs
from spon_plugin.machine import device_name
from spon_plugin.studies.evaluation import quality
from spon_plugin.studies.quality import Reference
from spon_transformers.loading import load_model, load_tokenizer


@contextmanager
def masked(model: Any, adapter: Adapter | None) -> Iterator[None]:
    """In this block the model runs under an adapter's masks; None for the dense model."""
    if adapter is None:
        yield
        return
    with sparse_inputs(model, adapter.masks, adapter.fields.dense_prefix):
        yield


def measure(model: Any, other: Any, adapter: Adapter | None, windows: Tensor, dense: Reference) -> dict[str, float]:
    """The figures of one row: of `model` under the masks, from the dense model and from `other` under them."""
    with masked(model, adapter):
        own = quality(model, windows, reference=dense)
        itself = Reference(model, windows)
    with masked(other, adapter):
        again = quality(other, windows, reference=itself)
    assert own.kl is not None and again.kl is not None and again.same_top is not None  # there was a reference
    figures = {"perplexity": own.perplexity, "again": again.perplexity}
    return {**figures, "dense": own.kl, "itself": again.kl, "same_top": again.same_top}


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory or its name on the Hub.")],
    adapter: Annotated[list[Path], typer.Option(help="An adapter directory; may repeat.")],
    text: Annotated[Path, typer.Option(help="A text to run on.")],
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens to run on, from the start of the text.")] = 2048,
    dtype: Annotated[str, typer.Option(help="What the model computes in the second time.")] = "float64",
    output: Annotated[Path | None, typer.Option("--json", help="Where to write the figures.")] = None,
) -> None:
    """Print a table, a row for the dense model and for each adapter."""
    first, second = load_model(model, "float32"), load_model(model, "float32").to(getattr(torch, dtype))
    windows = leading_windows(load_tokenizer(model), read_text(text), window, max_tokens)
    dense = Reference(first, windows)
    rows = {"dense": measure(first, second, None, windows, dense)}
    for path in adapter:
        rows[path.name] = measure(first, second, read_adapter(path), windows, dense)
    device = device_name(torch.device("cpu"))
    print(f"{device}; {windows.numel()} tokens of {text.name} in windows of {window}; float32 and {dtype}\n")
    print("| masks | KL to dense | KL to itself | same top | perplexity | again |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        kl = f"{row['dense']:.3g} | {row['itself']:.3g}"
        print(f"| {name} | {kl} | {row['same_top']:.1%} | {row['perplexity']:.2f} | {row['again']:.2f} |")
    if output:
        settings = {"text": text.name, "window": window, "tokens": windows.numel(), "dtype": dtype}
        result = {"device": device, "torch": torch.__version__, **settings, "rows": rows}
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
