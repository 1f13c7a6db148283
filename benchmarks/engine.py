# SPDX-License-Identifier: Apache-2.0
"""Decoding and first tokens in vLLM's engine, random weights of a shape: formats with an adapter, and dense ones.

    python -m benchmarks.engine --folder F --shape llama3-8b --layers 4 --json FILE
    python -m benchmarks.engine --folder F --shape llama3-8b --layers 4 --json FILE --only int4-50 --input-len 16,128

Each variant is a process with an engine of its own, which answers one request at a time; ``--only`` measures some and
adds them to those in FILE. `benchmarks.serve` measures servers, from outside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import SHAPES
from benchmarks.serve import write_random_model
from spon_plugin.machine import compute_dtype, device_name, name_of

VARIANTS = {
    "bf16": ("base", "bfloat16", False),
    "float32": ("base", "float32", False),
    "bf16-50": ("base", "bfloat16", True),
    "float32-50": ("base", "float32", True),
    "int4": ("int4", None, False),
    "int8-50": ("int8", None, True),
    "int4-50": ("int4", None, True),
}
"""Variant -> folder of the weights, dtype of activations (None: bfloat16 where native), and whether the adapter is on.

``int4`` is vLLM's own kernel, which its CPU build has for processors with AVX-512 alone.
"""


def write_model(folder: Path, shape: str, layers: int, weights: Collection[str]) -> None:
    """Write what is not there of a model of random weights, its adapter at 50%, and the model in eight or four bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spon_transformers import quantize as rounding

    rounding.RANGES = (1.0,)  # the search takes minutes, and random weights have nothing to clip
    if not (folder / "base").exists():
        write_random_model(folder, shape, layers, [0.5], "float32")
    for bits, group in ((8, None), (4, 128)):
        path = folder / f"int{bits}"
        if path.name in weights and not path.exists():
            model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
            rounding.quantize(model, rounding.Rounding(bits, group))
            rounding.save_quantized(model, path)
            AutoTokenizer.from_pretrained(folder / "base").save_pretrained(path)


def measure(folder: Path, name: str, lengths: Sequence[int], tokens: int, repeats: int) -> dict[str, Any]:
    """Measure one variant in this process: milliseconds of a decoded token, and of the first one by prompt length."""
    from vllm import LLM, SamplingParams

    weights, dtype, sparse = VARIANTS[name]
    dtype = dtype or name_of(compute_dtype(torch.bfloat16))
    adapter = {"quant_method": "spon", "adapter": str(folder.absolute() / "spon50"), "max_sparse_tokens": "auto"}
    more = {"quantization": "spon", "hf_overrides": {"quantization_config": adapter}} if sparse else {}
    engine = LLM(
        str(folder / weights), dtype=dtype, enforce_eager=True, max_num_seqs=8, enable_prefix_caching=False,
        max_model_len=max(lengths) + tokens + 64, **more,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def seconds(length: int, count: int) -> float:
        prompt = torch.randint(0, 256, (length,), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        start = time.perf_counter()
        engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        return time.perf_counter() - start

    result: dict[str, Any] = {"variant": name, "dtype": dtype, "first_token_ms": {}}
    for length in lengths:
        seconds(length, 1)
        first = statistics.median(seconds(length, 1) for _ in range(repeats))
        result["first_token_ms"][str(length)] = 1e3 * first
        if length == lengths[0]:
            seconds(length, 3)
            whole = statistics.median(seconds(length, tokens + 1) for _ in range(repeats))
            result["ms_per_token"] = 1e3 * (whole - first) / tokens
    return result


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lengths = list(rows[0]["first_token_ms"])
    lines = ["| variant | ms per token | " + " | ".join(f"first token, {n}" for n in lengths) + " |"]
    lines.append("| --- " + "| ---: " * (1 + len(lengths)) + "|")
    for row in rows:
        first = " | ".join(f"{row['first_token_ms'].get(n, float('nan')):.0f}" for n in lengths)
        lines.append(f"| {row['variant']} | {row['ms_per_token']:.1f} | {first} |")
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the models are there, or are written there")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama3-8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", help=f"comma-separated, out of {', '.join(VARIANTS)}; default all")
    parser.add_argument("--input-len", default="16,128,512", help="of prompts; decoding is measured after the first")
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True, help="figures are added there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    lengths = [int(value) for value in arguments.input_len.split(",")]
    if arguments.one:
        row = measure(arguments.folder, arguments.one, lengths, arguments.output_len, arguments.repeats)
        arguments.json.write_text(json.dumps(row))
        return
    names = arguments.only.split(",") if arguments.only else list(VARIANTS)
    write_model(arguments.folder, arguments.shape, arguments.layers, {VARIANTS[name][0] for name in names})
    held = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
    rows = {row["variant"]: row for row in held}
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    for name in names:
        part = arguments.folder / "row.json"
        again = [argument for argument in sys.argv[1:] if argument != str(arguments.json)]
        again.remove("--json")
        subprocess.run(
            [sys.executable, "-m", "benchmarks.engine", *again, "--json", str(part), "--one", name],
            env={**own, **os.environ}, check=True,
        )  # fmt: skip
        rows[name] = json.loads(part.read_text())
        result = {
            "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "vllm": version("vllm"), "torch": torch.__version__, "model": arguments.shape, "layers": arguments.layers,
            "environment": {k: v for k, v in os.environ.items() if k.startswith(("VLLM_CPU_", "OMP_"))},
            "rows": [rows[name] for name in VARIANTS if name in rows],
        }  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()
