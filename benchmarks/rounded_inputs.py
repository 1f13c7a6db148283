# SPDX-License-Identifier: Apache-2.0
"""What it costs that the kernels of four-bit weights round their inputs to eight bits: perplexity with and without.

    spon quantize MODEL --bits 4 --group 64 -o w4
    python -m benchmarks.rounded_inputs w4 --adapter ADAPTER --text wikitext2.txt

The adapter is merged into the four-bit model, which then reads windows of text as it decodes: a cache, and a pass for
each `--step` tokens. `exact` is the same model with its inputs as they are. Hard masks amplify any rounding, that of
float32 included: inputs near their thresholds change sides, and single predictions with them (by about 0.7 on SmolLM2
at 50%), at random. So the difference comes with its standard error; `--unmasked` sets all thresholds to 0, and what is
left is the rounding alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from spon_plugin.calibration.text import leading_windows, read_text
from spon_plugin.kernels.few_rows import CPU_ROWS
from spon_plugin.layers.sparse_quantized import SparseQuantizedLinear
from spon_transformers.loading import load_model, load_tokenizer


@torch.no_grad()
def decoded_losses(model: Any, windows: Tensor, step: int) -> Tensor:
    """Loss of each prediction within `windows` ``[count, length]``, `step` tokens of one window a pass."""
    losses = []
    for window in windows:
        cache = DynamicCache()
        for part in window.split(step):
            first = cache.get_seq_length()
            logits = model(input_ids=part[None], past_key_values=cache, use_cache=True).logits[0].float()
            targets = window[first + 1 : first + 1 + len(part)]
            losses.append(F.cross_entropy(logits[: len(targets)], targets, reduction="none"))
    return torch.cat(losses).double()


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A four-bit model, as `spon quantize` writes it.")],
    adapter: Annotated[Path, typer.Option(help="The adapter directory.")],
    text: Annotated[Path, typer.Option(help="A text to evaluate on.")],
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens to evaluate on, from the start of the text.")] = 4096,
    step: Annotated[int, typer.Option(help="Tokens of a pass: the kernels take up to 8.")] = 1,
    unmasked: Annotated[
        bool, typer.Option("--unmasked", help="Thresholds of 0, and the dense model's biases.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="What the model computes in.")] = "float32",
) -> None:
    """Print one JSON object: the two perplexities, their ratio, and its standard error."""
    if not 1 <= step <= CPU_ROWS:
        raise typer.BadParameter(f"--step {step}: the kernels for few rows take 1 to {CPU_ROWS}")
    windows = leading_windows(load_tokenizer(model), read_text(text), window, max_tokens)
    merged = PeftModel.from_pretrained(load_model(model, dtype, stored=True), adapter).merge_and_unload().eval()
    layers = [module for module in merged.modules() if isinstance(module, SparseQuantizedLinear)]
    losses = {}
    for name, exact in (("exact", True), ("rounded", False)):
        for layer in layers:
            layer.exact = exact
            if unmasked and layer.spon_threshold.any():
                layer.spon_threshold.zero_()
                layer.bias.data.copy_(layer.spon_dense_bias)
        losses[name] = decoded_losses(merged, windows, step)
    change = losses["rounded"] - losses["exact"]
    figures = {"layers": len(layers), "kernel": layers[0].kernel, "tokens": windows.numel(), "step": step}
    figures |= {name: math.exp(values.mean()) for name, values in losses.items()}
    ratio, error = math.exp(change.mean()), float(change.std() / len(change) ** 0.5)
    print(json.dumps({**figures, "unmasked": unmasked, "ratio": ratio, "standard_error": error}, indent=2))


if __name__ == "__main__":
    typer.run(main)
