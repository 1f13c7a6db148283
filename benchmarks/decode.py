# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of a whole decoder: dense, TEAL (mask, no bias) and SPON (mask and bias), in one run.

    python -m benchmarks.decode MODEL --adapter ADAPTER                       # a real model and its adapter
    python -m benchmarks.decode --shape llama3-8b --sparsity 0.5 --device cuda

With ``--shape`` the weights are random and each layer's threshold is the quantile of its own inputs, so that the model
is as sparse as asked. On a GPU each step is one CUDA graph over a static KV cache; on a CPU the model runs as
transformers runs it. The three variants take turns of eight tokens, so that they see the same machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from benchmarks.sparse_linear import device_name
from spon_plugin import Mask, SparseLinear, read_adapter
from spon_plugin.decoder.sites import find_sites
from spon_plugin.layers.sparse_linear import sparse_like
from spon_plugin.machine import DTYPES
from spon_plugin.weights.fold import fold_alpha

SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "qwen2.5-0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024,
    },
}  # fmt: skip
PROMPT = 64
TURN = 8
Step = Callable[[], object]


def sparse_copy(model: nn.Module, masks: Mapping[str, Mask]) -> nn.Module:
    """`model` with sparse layers under `masks`; embeddings, norms and the head are shared with it.

    Args:
        model: the dense model.
        masks: by module path; ``W (center + alpha)`` is for `with_biases` to add.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    sparse = copy.deepcopy(model, dict(shared))
    for path, mask in masks.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        layer = sparse_like(linear, "meta")
        layer.weight, layer.bias = nn.Parameter(linear.weight.detach(), requires_grad=False), linear.bias
        own = mask.to(linear.weight.device)
        layer.spon_threshold, layer.spon_center = own.threshold, own.center
        layer.arrange_for_kernels()
        sparse.set_submodule(path, layer)
    return sparse


def with_biases(sparse: nn.Module, biases: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of a sparse model that shares all weights with it and has other biases."""
    other = copy.deepcopy(sparse, {id(parameter): parameter for parameter in sparse.parameters()})
    for path, bias in biases.items():
        layer = other.get_submodule(path)
        assert isinstance(layer, SparseLinear)
        layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=False)
    return other


@torch.no_grad()
def quantile_masks(model: Any, sparsity: float, ids: torch.Tensor) -> dict[str, Mask]:
    """For each linear of `model` a mask at the `sparsity` quantile of its own inputs on `ids`, layers before masked."""
    paths = [path for site in find_sites(model) for path in site.modules]
    thresholds = {path: torch.zeros(1, device=ids.device) for path in paths}

    def watch(path: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = args[0]
            sample = x[:, 1:].abs().float().flatten()
            thresholds[path] = torch.quantile(sample[: 1 << 24], sparsity).reshape(1)
            return (torch.where(x.abs() <= thresholds[path], 0, x),)

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(watch(path)) for path in paths]
    model(ids)
    for handle in handles:
        handle.remove()
    return {path: Mask(threshold) for path, threshold in thresholds.items()}


def folded_biases(model: Any, masks: Mapping[str, Mask]) -> dict[str, torch.Tensor]:
    """Module path -> ``b + W (center + alpha)``, for the linears that have a centre or an alpha."""
    biases = {}
    for path, mask in masks.items():
        linear = model.get_submodule(path)
        if mask.constant is not None:
            folded = fold_alpha(linear, mask.constant, path)
            biases[path] = folded if linear.bias is None else folded + linear.bias.float()
    return biases


@torch.no_grad()
def eager_step(model: Any, ids: torch.Tensor) -> Step:
    """A step of greedy decoding after the prompt `ids`, as transformers runs it, on a growing cache."""
    cache = DynamicCache(config=model.config)
    state = {"token": model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)}

    def step() -> None:
        state["token"] = model(state["token"], past_key_values=cache).logits[:, -1:].argmax(-1)

    return step


@torch.no_grad()
def graph_step(model: Any, ids: torch.Tensor, length: int) -> Step:
    """The same as one CUDA graph over a static cache; every replay writes at the same position."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    position = torch.tensor([ids.shape[1]], device=ids.device)

    def run() -> None:
        out = model(token, past_key_values=cache, cache_position=position, position_ids=position[None])
        token.copy_(out.logits[:, -1:].argmax(-1))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@torch.no_grad()
def measure(models: dict[str, Any], ids: torch.Tensor, tokens: int) -> dict[str, float]:
    """Median seconds per token of each model, the models taking turns."""
    cuda = ids.is_cuda
    steps = {
        name: graph_step(m, ids, PROMPT + tokens + 8) if cuda else eager_step(m, ids) for name, m in models.items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(tokens // TURN):
        for name, step in steps.items():
            step()  # brings this model's code and small tensors back into the caches, as in steady decoding
            for _ in range(TURN - 1):
                start = time.perf_counter()
                step()
                if cuda:
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model directory or hub name")
    parser.add_argument("--adapter", type=Path, help="its adapter")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of that shape instead of a model")
    parser.add_argument("--sparsity", default="0.5", help="with --shape; comma-separated")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=128, help="decoded by each variant")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    if bool(arguments.shape) == bool(arguments.model) or bool(arguments.model) != bool(arguments.adapter):
        parser.error("give a model with --adapter, or --shape")

    torch.manual_seed(0)
    dtype, device = DTYPES[arguments.dtype], torch.device(arguments.device)
    if arguments.shape:
        with torch.device(device):
            dense = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[arguments.shape]), dtype=dtype)
    else:
        dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    dense = dense.to(device).eval().requires_grad_(False)
    ids = torch.randint(0, dense.config.vocab_size, (1, PROMPT), device=device)

    rows = []
    print("| model | target | dense tokens/s | TEAL | SPON | TEAL / dense | SPON / dense | SPON / TEAL |")
    print("| --- " + "| ---: " * 7 + "|")
    for sparsity in [None] if arguments.adapter else [float(value) for value in arguments.sparsity.split(",")]:
        if sparsity is None:
            adapter = read_adapter(arguments.adapter)
            teal = sparse_copy(dense, adapter.masks)
            teal = with_biases(teal, folded_biases(dense, adapter.without_alpha().masks))
            biases = folded_biases(dense, adapter.masks)
        else:
            masks = quantile_masks(dense, sparsity, ids)
            teal = sparse_copy(dense, masks)
            biases = {path: 1e-3 * torch.randn(dense.get_submodule(path).out_features) for path in masks}
        seconds = measure({"dense": dense, "teal": teal, "spon": with_biases(teal, biases)}, ids, arguments.tokens)
        target = sparsity if sparsity is not None else read_adapter(arguments.adapter).fields.sparsity
        name = arguments.shape or Path(arguments.model).name
        rate = {key: 1 / value for key, value in seconds.items()}
        rows.append({"model": name, "sparsity": target, **{f"{k}_tokens_per_second": v for k, v in rate.items()}})
        print(
            f"| {name} | {target:.0%} | {rate['dense']:.1f} | {rate['teal']:.1f} | {rate['spon']:.1f} "
            f"| {rate['teal'] / rate['dense']:.2f} | {rate['spon'] / rate['dense']:.2f} "
            f"| {rate['spon'] / rate['teal']:.2f} |",
            flush=True,
        )
        del teal
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"device": device_name(device), "torch": torch.__version__, "dtype": arguments.dtype, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
