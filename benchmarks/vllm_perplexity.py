# SPDX-License-Identifier: Apache-2.0
"""Perplexity through vLLM's `prompt_logprobs` beside that of `spon eval`, for dense, TEAL and SPON, in float32.

    python -m benchmarks.vllm_perplexity MODEL --adapter ADAPTER --text wikitext2.txt

vLLM runs in token mode ``all``, which masks every position. `spon eval` leaves an adapter's dense prefix dense; so the
function that vLLM computes is measured in PyTorch as well, by the evaluation behind `spon eval` with no dense
position, and that is what the ratio refers to. Windows and predictions are the same in all columns.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from spon_plugin import Adapter, read_adapter, sparse_inputs, write_adapter
from spon_plugin.calibration.text import leading_windows, read_text
from spon_plugin.studies.evaluation import perplexity
from spon_transformers.loading import load_model, load_tokenizer


def vllm_perplexity(llm: Any, windows: Tensor) -> float:
    """Perplexity of all predictions within `windows` ``[count, length]``, by an engine's `prompt_logprobs`.

    Args:
        llm: `vllm.LLM`.
        windows: token ids; a window is a prompt.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": window.tolist()} for window in windows]
    total, count = 0.0, 0
    for output in llm.generate(prompts, parameters, use_tqdm=False):
        for token, step in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            total, count = total - step[token].logprob, count + 1
    return math.exp(total / count)


def references(model: Any, adapter: Adapter, windows: Tensor) -> dict[str, dict[str, float]]:
    """Perplexities in PyTorch: variant -> ``eval`` (`spon eval`'s) and ``all`` (every position masked)."""
    dense = perplexity(model, windows)
    rows = {"dense": {"eval": dense, "all": dense}}
    for variant, masks in (("teal", adapter.without_alpha().masks), ("spon", adapter.masks)):
        rows[variant] = {}
        for name, prefix in (("eval", 1), ("all", 0)):
            with sparse_inputs(model, masks, prefix):
                rows[variant][name] = perplexity(model, windows)
    return rows


def served(model: str, adapter: Path | None, windows: Tensor) -> float:
    """`vllm_perplexity` of an engine of its own, in float32, with an adapter or dense."""
    from vllm import LLM

    arguments: dict[str, Any] = {}
    if adapter is not None:
        fields = {"quant_method": "spon", "adapter": str(adapter.resolve()), "token_mode": "all"}
        arguments = {"quantization": "spon", "hf_overrides": {"quantization_config": fields}}
    arguments |= {"dtype": "float32", "max_model_len": windows.shape[1] + 1, "enforce_eager": True}
    llm = LLM(model, enable_prefix_caching=False, **arguments)
    try:
        return vllm_perplexity(llm, windows)
    finally:
        llm.llm_engine.engine_core.shutdown()


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a hub name, or a .gguf file.")],
    adapter: Annotated[Path, typer.Option(help="The adapter directory.")],
    text: Annotated[Path, typer.Option(help="A text to evaluate on.")],
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens to evaluate on, from the start of the text.")] = 16384,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    """Print perplexities of dense, TEAL and SPON in PyTorch and in vLLM."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    given, tokenizer, loaded = read_adapter(adapter), load_tokenizer(model), load_model(model, "float32")
    windows = leading_windows(tokenizer, read_text(text), window, max_tokens)
    rows = references(loaded, given, windows)
    del loaded
    with tempfile.TemporaryDirectory() as temporary:
        write_adapter(given.without_alpha(), Path(temporary) / "teal")
        for variant, source in (("dense", None), ("teal", Path(temporary) / "teal"), ("spon", adapter)):
            rows[variant]["vllm"] = served(model, source, windows)
    print(f"{len(windows)} windows of {window} tokens of {text.name}, float32\n")
    print("| model | spon eval | every position masked | vLLM | vLLM / masked |\n| --- | ---: | ---: | ---: | ---: |")
    for variant, row in rows.items():
        print(
            f"| {variant} | {row['eval']:.3f} | {row['all']:.3f} | {row['vllm']:.3f} | {row['vllm'] / row['all']:.4f} |"
        )
    if json_file is not None:
        from importlib.metadata import version

        protocol = {"text": text.name, "windows": len(windows), "window": window, "dtype": "float32"}
        about = {"model": Path(model).name, "adapter_digest": given.digest, "vllm": version("vllm")}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({**about, **protocol, "perplexity": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
