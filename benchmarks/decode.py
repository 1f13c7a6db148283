# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of a whole decoder, dense, masked and quantized, beside what people use instead, in one run.

    python -m benchmarks.decode MODEL --adapter ADAPTER                       # a real model and its adapter
    python -m benchmarks.decode MODEL --adapter ADAPTER --format bf16,int8,int4 --against llama.cpp --text test.txt
    python -m benchmarks.decode --shape llama3-8b --sparsity 0.5 --device cuda

With ``--shape`` the weights are random and each layer's threshold is the quantile of its own inputs, so that the model
is as sparse as asked. On a GPU each step is one CUDA graph over a static KV cache; on a CPU the dense model runs as
transformers runs it, and models on our kernels as merged ones do. All variants take turns of eight tokens, so that they
see the same machine.

``--format int8`` and ``int4`` are `spon quantize`'s rounding, with an output head of eight bits by output, on our
kernels; ``--against`` adds what people use instead: llama.cpp on the GGUF files of ``--gguf``, or on some of the same
weights by its own quantizer; vLLM's dense model; torchao's int8. ``read`` is what a token reads of weights, scales
included, and its share of the bandwidth at which torch sums up memory; ``in kernels`` is the part of its time that our
CPU kernels take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, StaticCache

from benchmarks.variants import (
    Step,
    Variant,
    folded_biases,
    masked,
    quantile_masks,
    rounded_copy,
    sparse_copy,
    torchao_copy,
    variant,
)
from spon_plugin import Mask, read_adapter
from spon_plugin.kernels.cpu import kernel
from spon_plugin.machine import DTYPES, device_name, name_of
from spon_transformers.gguf_writer import write_gguf

SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
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
BITS = {"int8": 8, "int4": 4}
OTHERS = ("llama.cpp", "vllm", "torchao")
PROMPT = 64
TURN = 8


@torch.no_grad()
def graph_step(model: Any, ids: torch.Tensor, length: int) -> Step:
    """A step as one CUDA graph over a static cache; every replay writes at the same position."""
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
def compiled_step(model: Any, ids: torch.Tensor, length: int) -> Step:
    """A step as `torch.compile` makes it, over a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    run = torch.compile(model, dynamic=False)
    state = {"token": model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)}
    position = torch.tensor([ids.shape[1]])

    @torch.no_grad()
    def step() -> None:
        out = run(state["token"], past_key_values=cache, cache_position=position, position_ids=position[None])
        state["token"] = out.logits[:, -1:].argmax(-1)
        position.add_(1)

    return step


@contextmanager
def kernel_time() -> Iterator[list[float]]:
    """Seconds of each launch of our CPU kernels, while the context lasts."""
    taken: list[float] = []
    launch, run = kernel.parallel, kernel.parallel()

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        run(*arguments)
        taken.append(time.perf_counter() - start)

    kernel.parallel = lambda: timed  # type: ignore[assignment]
    try:
        yield taken
    finally:
        kernel.parallel = launch


@torch.no_grad()
def measure(variants: Sequence[Variant], ids: torch.Tensor, tokens: int) -> dict[str, tuple[float, float, float]]:
    """Median seconds per token of each variant, the variants taking turns; those of the prompt; those in our kernels.

    The last are of a CPU, and taken in the steps that begin a turn.
    """
    cuda = ids.is_cuda
    steps, first = {}, {}
    for each in variants:
        each.start(ids)
        start = time.perf_counter()
        steps[each.name] = each.start(ids)
        if cuda:
            torch.cuda.synchronize()
        first[each.name] = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in steps}
    kernels: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(max(1, tokens // TURN)):
        for name, step in steps.items():
            step()  # brings this model's code and small tensors back into the caches, as in steady decoding
            if not cuda and kernel.is_available():
                with kernel_time() as taken:
                    step()
                kernels[name].append(sum(taken))
            for _ in range(TURN - 2):
                start = time.perf_counter()
                step()
                if cuda:
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
    return {
        name: (statistics.median(values), first[name], statistics.median(kernels[name] or [0.0]))
        for name, values in times.items()
    }


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second at which torch sums up memory."""
    buffer = torch.zeros(1 << 25, dtype=torch.int64, device=device)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        buffer.sum().item()
        times.append(time.perf_counter() - start)
    return 8 * buffer.numel() / statistics.median(times)


def make_variants(
    dense: Any,
    masks: Mapping[str, Mapping[str, Mask]],
    formats: Sequence[str],
    ids: torch.Tensor,
    tokens: int,
    compiles: bool = False,
    torchao: bool = False,
) -> list[Variant]:
    """The dense model, and for each format and mapping of masks a sparse one.

    Args:
        dense: in the dtype of the benchmark.
        masks: name of a variant -> masks by module path.
        formats: "bf16" for the dtype of `dense`, or names of `BITS`.
        ids: a prompt.
        tokens: that each will decode.
        compiles: whether each has a twin that is compiled.
        torchao: whether torchao's int8 is among them.
    """
    found: list[Variant] = []
    length = PROMPT + 2 * tokens + 8

    def make(name: str, model: Any) -> None:
        own = variant(name, model, ids)
        if ids.is_cuda:
            own = own._replace(start=lambda ids: graph_step(model, ids, length))
        found.append(own)
        if compiles:
            start: Callable[[torch.Tensor], Step] = lambda ids: compiled_step(model, ids, length)  # noqa: E731
            found.append(own._replace(name=f"{name}, compiled", start=start))

    dtype = next(dense.parameters()).dtype
    make(f"{name_of(dtype)} dense", dense)
    if torchao:
        make("torchao int8 dense", torchao_copy(dense))
    for format in formats:
        if format == "bf16":
            for name, own in masks.items():
                make(name, sparse_copy(dense, own, folded_biases(dense, own)))
            continue
        sizes = dense.config.hidden_size, dense.config.intermediate_size
        group = next(group for group in (128, 64, 32) if not any(size % group for size in sizes))
        rounded = rounded_copy(dense, BITS[format], group if BITS[format] == 4 else None)
        make(f"{format} dense", rounded)
        for name, own in masks.items():
            make(f"{format} {name}", masked(rounded, own, dtype))
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| variant | tokens/s | ms | in kernels | first token ms | MB read | of bandwidth | MB held | perplexity |"
    ]
    lines.append("| --- " + "| ---: " * 8 + "|")
    for row in rows:
        quality = "" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
        lines.append(
            f"| {row['name']} | {row['tokens_per_second']:.1f} | {1e3 / row['tokens_per_second']:.1f} "
            f"| {row['kernels_ms']:.1f} | {row['first_token_ms']:.0f} "
            f"| {row['bytes_read'] / 1e6:.0f} | {row['share_of_bandwidth']:.0%} | {row['bytes_held'] / 1e6:.0f} "
            f"| {quality} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model directory or hub name")
    parser.add_argument("--adapter", type=Path, help="its adapter")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of that shape instead of a model")
    parser.add_argument("--layers", type=int, help="with --shape: so many blocks instead of its own")
    parser.add_argument("--sparsity", default="0.5", help="with --shape; comma-separated")
    parser.add_argument("--format", default="bf16", help="comma-separated: bf16 (that is, --dtype), int8, int4")
    parser.add_argument("--against", default="", help=f"comma-separated: {', '.join(OTHERS)}, each installed")
    parser.add_argument("--gguf", type=Path, nargs="*", default=[], help="for llama.cpp; else one for each of --kinds")
    parser.add_argument("--kinds", default="Q4_K_M", help="comma-separated: llama.cpp's formats to make files of")
    parser.add_argument("--text", type=Path, help="score each variant on its first tokens")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens, with --text")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--compile", action="store_true", help="each variant by torch.compile as well; on a CPU")
    parser.add_argument("--tokens", type=int, default=128, help="decoded by each variant")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    if bool(arguments.shape) == bool(arguments.model) or bool(arguments.model) != bool(arguments.adapter):
        parser.error("give a model with --adapter, or --shape")
    formats = arguments.format.split(",")
    if set(formats) - {"bf16", *BITS}:
        parser.error(f"--format {arguments.format}: expected some of bf16, {', '.join(BITS)}")
    others = [name for name in arguments.against.split(",") if name]
    if set(others) - set(OTHERS) or (others and arguments.device != "cpu"):
        parser.error(f"--against {arguments.against}: expected some of {', '.join(OTHERS)}, and --device cpu")
    if arguments.compile and arguments.device != "cpu":
        parser.error("--compile: expected --device cpu; on a GPU each step is a CUDA graph")

    torch.manual_seed(0)
    dtype, device = DTYPES[arguments.dtype], torch.device(arguments.device)
    if arguments.shape:
        config = LlamaConfig(**SHAPES[arguments.shape])
        config.num_hidden_layers = arguments.layers or config.num_hidden_layers
        with torch.device(device):
            dense = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    dense = dense.to(device).eval().requires_grad_(False)
    ids = torch.randint(0, dense.config.vocab_size, (1, PROMPT), device=device)
    windows = None
    if arguments.text:
        tokens = AutoTokenizer.from_pretrained(arguments.model)(arguments.text.read_text()[: 1 << 20]).input_ids
        windows = torch.tensor(tokens[: 512 * arguments.windows]).view(-1, 512)
        ids = windows[-1:, :PROMPT].to(device)
    masks: dict[str, Mapping[str, Mask]] = {}
    if arguments.adapter:
        adapter = read_adapter(arguments.adapter)
        masks = {f"TEAL {adapter.fields.sparsity:.0%}": adapter.without_alpha().masks}
        masks[f"SPON {adapter.fields.sparsity:.0%}"] = adapter.masks
    else:
        for sparsity in (float(value) for value in arguments.sparsity.split(",")):
            masks[f"masked {sparsity:.0%}"] = quantile_masks(dense, sparsity, ids)

    with tempfile.TemporaryDirectory() as directory:
        context = PROMPT + 2 * arguments.tokens + 16
        if "vllm" in others:  # first: it sets threads up, and makes no engine once Numba is there
            from benchmarks import vllm_engine

            path, held = Path(directory) / "model", sum(p.numel() * p.element_size() for p in dense.parameters())
            dense.save_pretrained(path)
            read = held - (0 if dense.config.tie_word_embeddings else dense.get_input_embeddings().weight.nbytes)
            variants = [vllm_engine.variant(path, dtype, read, held, context)]
        else:
            variants = []
        more = make_variants(dense, masks, formats, ids, arguments.tokens, arguments.compile, "torchao" in others)
        variants = [*more, *variants]
        if "llama.cpp" in others:
            from benchmarks import llama_cpp

            kinds = arguments.kinds.split(",")
            files = arguments.gguf or [write_gguf(dense, Path(directory) / f"{kind}.gguf", kind) for kind in kinds]
            variants += [llama_cpp.variant(file, context) for file in files]
        bandwidth = read_bandwidth(device)
        seconds = measure(variants, ids, arguments.tokens)
        rows = [
            {
                "name": each.name,
                "tokens_per_second": 1 / seconds[each.name][0],
                "first_token_ms": 1e3 * seconds[each.name][1],
                "kernels_ms": 1e3 * seconds[each.name][2],
                "bytes_read": each.bytes_read,
                "share_of_bandwidth": each.bytes_read / seconds[each.name][0] / bandwidth,
                "bytes_held": each.bytes_held,
                "perplexity": None if windows is None else each.perplexity(windows),
            }
            for each in variants
        ]
    name = arguments.shape or Path(arguments.model).name
    print(f"{name}, {device_name(device)}, {arguments.dtype}, memory {bandwidth / 1e9:.1f} GB/s\n")
    print(table(rows))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"model": name, "device": device_name(device), "torch": torch.__version__, "dtype": arguments.dtype}
        result |= {"read_bytes_per_second": bandwidth, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
