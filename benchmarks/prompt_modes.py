# SPDX-License-Identifier: Apache-2.0
"""What masking a prompt costs: perplexity of the second half of windows after a dense and after a masked first half.

    python -m benchmarks.prompt_modes MODEL --adapter ADAPTER --text wikitext2.txt

It is how vLLM's token modes differ for a request: ``decode`` leaves a prompt dense, ``all`` masks it; training masks it
but for the adapter's `dense_prefix` first positions. The continuation is masked in all of them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from spon_plugin import Adapter, read_adapter, sparse_inputs
from spon_plugin.calibration.text import leading_windows, read_text
from spon_plugin.decoder.positions import whole_windows
from spon_transformers.loading import load_model, load_tokenizer


@torch.no_grad()
def second_half(model: nn.Module, windows: Tensor, batch_size: int) -> float:
    """Perplexity of the tokens in the second half of `windows` ``[count, length]``, given those before them."""
    start, total = windows.shape[1] // 2, 0.0
    for ids in windows.split(batch_size):
        with whole_windows():
            logits = model(input_ids=ids).logits[:, start - 1 : -1]
        total += F.cross_entropy(logits.flatten(0, 1).float(), ids[:, start:].flatten(), reduction="sum").item()
    return math.exp(total / windows[:, start:].numel())


def measure(model: nn.Module, adapter: Adapter, windows: Tensor) -> dict[str, Any]:
    """The perplexities: ``dense``, and for each prompt a pair with alpha and without.

    Args:
        model: the dense model.
        adapter: its masks and alphas.
        windows: token ids ``[count, length]``.
    """
    dense_positions = {"dense": windows.shape[1] // 2, "as in training": adapter.fields.dense_prefix, "masked": 0}
    rows: dict[str, Any] = {"dense": second_half(model, windows, 4), "prompts": {}}
    for prompt, positions in dense_positions.items():
        rows["prompts"][prompt] = {}
        for name, variant in (("spon", adapter), ("teal", adapter.without_alpha())):
            with sparse_inputs(model, variant.masks, positions):
                rows["prompts"][prompt][name] = second_half(model, windows, 4)
    return rows


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a hub name, or a .gguf file.")],
    adapter: Annotated[Path, typer.Option(help="The adapter directory.")],
    text: Annotated[Path, typer.Option(help="A text to evaluate on.")],
    window: Annotated[int, typer.Option(help="Tokens per window; its first half is the prompt.")] = 256,
    windows: Annotated[int, typer.Option(help="How many windows, from the start of the text.")] = 16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    """Print perplexities after a dense prompt, and after a masked one."""
    given, tokenizer, loaded = read_adapter(adapter), load_tokenizer(model), load_model(model, "float32")
    ids = leading_windows(tokenizer, read_text(text), window, window * windows)
    rows = measure(loaded, given, ids)
    print(f"{len(ids)} windows of {window} tokens of {text.name}, float32; dense {rows['dense']:.2f}\n")
    print("| prompt | SPON | TEAL (same masks, no alpha) |\n| --- | ---: | ---: |")
    for prompt, row in rows["prompts"].items():
        print(f"| {prompt} | {row['spon']:.2f} | {row['teal']:.2f} |")
    if json_file is not None:
        protocol = {"text": text.name, "windows": len(ids), "window": window, "dtype": "float32"}
        about = {"model": Path(model).name, "adapter_digest": given.digest, "sparsity": given.fields.sparsity}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({**about, **protocol, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
