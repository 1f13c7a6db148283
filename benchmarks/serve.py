# SPDX-License-Identifier: Apache-2.0
"""Decoded tokens per second in vLLM, dense and with adapters, by vLLM's own `vllm bench serve`, in one run.

    python -m benchmarks.serve MODEL --adapter spon50 --adapter spon70 --json FILE
    python -m benchmarks.serve --shape llama3-8b --sparsity 0.5,0.7              # random weights of that shape
    python -m benchmarks.serve MODEL --adapter spon50 -- --enforce-eager         # the rest goes to `vllm serve`

Each variant is a `vllm serve` of its own that answers one request at a time; with ``--rounds`` they take turns. A rate
is the inverse of vLLM's TPOT, the time per token after the first. With ``--shape``, thresholds are quantiles of each
layer's own inputs; with ``--layers``, a part of the model, whose output head has the same part of its vocabulary. What
the mask really zeroed comes from the server's ``/metrics``; where CUDA graphs replay, nothing is counted there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.decode import PROMPT, SHAPES, quantile_masks
from spon_plugin import Adapter, SponFields, read_adapter, write_adapter
from spon_plugin.adapter.mask import with_alphas
from spon_plugin.machine import DTYPES, device_name

START_SECONDS = 1800
KEPT = ("completed", "total_input_tokens", "total_output_tokens", "median_ttft_ms", "median_tpot_ms", "mean_tpot_ms",
        "p99_tpot_ms", "median_itl_ms", "output_throughput")  # fmt: skip


@torch.no_grad()
def write_random_model(folder: Path, shape: str, layers: int | None, sparsities: Sequence[float], dtype: str) -> None:
    """Write a model of random weights as ``folder/base``, and an adapter ``folder/sponNN`` for each sparsity.

    Args:
        folder: where they go.
        shape: a name in `SHAPES`.
        layers: how many of its blocks; None for all.
        sparsities: the targets.
        dtype: a name in `DTYPES`.
    """
    config = dict(SHAPES[shape])
    layers = layers or config["num_hidden_layers"]
    config["vocab_size"] = config["vocab_size"] * layers // config["num_hidden_layers"]
    config |= {"num_hidden_layers": layers, "max_position_embeddings": 4096}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=DTYPES[dtype])
        ids = torch.randint(0, config["vocab_size"], (1, PROMPT))
    model.eval().save_pretrained(folder / "base")
    # One token is one word, so that vLLM's random prompts have the length that it asks for.
    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(config["vocab_size"])}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "base")
    for sparsity in sparsities:
        masks = {path: mask.to("cpu") for path, mask in quantile_masks(model, sparsity, ids).items()}
        alphas = {path: 1e-3 * torch.randn(model.get_submodule(path).in_features) for path in masks}
        peft = {
            "base_model_name_or_path": str(folder / "base"), "task_type": "CAUSAL_LM", "inference_mode": True,
            "target_modules": sorted({path.rpartition(".")[2] for path in masks}),
        }  # fmt: skip
        adapter = Adapter(SponFields(sparsity), with_alphas(masks, alphas), peft)
        write_adapter(adapter, folder / f"spon{round(100 * sparsity)}")


@contextmanager
def serving(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[str]:
    """The address of `server_process`."""
    with server_process(command, environment, log) as (_process, address):
        yield address


@contextmanager
def server_process(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`vllm serve` with these arguments; yields the process, which leads a session, and its address once it is healthy.

    Args:
        command: what follows `vllm serve`.
        environment: the process's whole environment.
        log: what it prints goes there.

    Raises:
        RuntimeError: it ended, or did not get ready; the message is the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(
            [vllm(), "serve", *command, "--host", "127.0.0.1", "--port", str(port)],
            env=dict(environment), stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + START_SECONDS
        while not _answers(f"{address}/health"):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"vllm serve is not ready:\n{log.read_text()[-4000:]}")
            time.sleep(1)
        yield process, address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def variant_server(model: str, adapter: Path | None, arguments: argparse.Namespace, log: Path) -> Iterator[str]:
    """`serving` for `model` with an adapter, or dense (None)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SPON_")}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if adapter is not None:
        environment["SPON_ADAPTER"] = str(adapter.resolve())
    command = [model, "--max-model-len", str(arguments.input_len + arguments.output_len + 64), "--max-num-seqs", "4"]
    command += ["--dtype", arguments.dtype, *arguments.serve]
    with serving(command, environment, log) as address:
        yield address


def measure(address: str, model: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the server at `address`: the fields `KEPT` of vLLM's result, and the sparsity."""
    bench = [vllm(), "bench", "serve", "--model", model, "--base-url", address, "--dataset-name", "random"]
    bench += ["--random-input-len", str(arguments.input_len), "--random-output-len", str(arguments.output_len)]
    bench += ["--num-prompts", str(arguments.requests), "--num-warmups", "1", "--max-concurrency", "1"]
    bench += ["--ignore-eos", "--seed", "0", "--percentile-metrics", "ttft,tpot,itl", "--disable-tqdm"]
    bench += ["--save-result", "--result-dir", str(folder), "--result-filename", "result.json"]
    before = counters(address)
    done = subprocess.run(bench, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"vllm bench serve failed:\n{(done.stdout + done.stderr)[-4000:]}")
    time.sleep(1.1)  # workers hand their counters over once in a second, while they work
    ask(address, model)
    after = counters(address)
    result = json.loads((folder / "result.json").read_text())
    if result["completed"] != arguments.requests:
        raise RuntimeError(f"vllm bench serve completed {result['completed']} of {arguments.requests} requests")
    inputs, zeroed = (after.get(name, 0) - before.get(name, 0) for name in ("sampled_inputs", "sampled_zeroed"))
    return {**{key: result[key] for key in KEPT}, "measured_sparsity": zeroed / inputs if inputs else None}


def measure_all(
    model: str, adapters: Sequence[Path], arguments: argparse.Namespace, folder: Path
) -> dict[Path | None, list[dict[str, Any]]]:
    """What `measure` says in each round, by adapter; None is the dense model."""
    runs: dict[Path | None, list[dict[str, Any]]] = {adapter: [] for adapter in [None, *adapters]}
    with ExitStack() as stack:
        servers = {}
        if arguments.together:
            for index, adapter in enumerate(runs):
                server = variant_server(model, adapter, arguments, folder / f"server{index}.log")
                servers[adapter] = stack.enter_context(server)
        for _ in range(arguments.rounds):
            for adapter, done in runs.items():
                if arguments.together:
                    done.append(measure(servers[adapter], model, arguments, folder))
                else:
                    with variant_server(model, adapter, arguments, folder / "server.log") as address:
                        done.append(measure(address, model, arguments, folder))
                print(adapter or "dense", json.dumps(done[-1]), file=sys.stderr, flush=True)
    return runs


def ask(address: str, model: str) -> None:
    """One short completion."""
    body = json.dumps({"model": model, "prompt": [1, 2, 3], "max_tokens": 8, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=600).read()


def counters(address: str) -> dict[str, float]:
    """The plugin's counters on ``/metrics``, without their prefix; they stay 0 in a dense server."""
    text = urllib.request.urlopen(f"{address}/metrics", timeout=60).read().decode()
    return {key: float(value) for key, value in re.findall(r"^spon:(\w+)_total (\S+)$", text, re.M)}


def vllm() -> str:
    """The command of vLLM, of this Python's environment first."""
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if beside.exists() else shutil.which("vllm") or "vllm"


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5)
    except OSError:
        return False
    return True


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table; the first is the dense one."""
    lines = ["| variant | target | measured | time to first token, ms | ms per token | tokens/s | over dense |"]
    lines.append("| --- " + "| ---: " * 6 + "|")
    for row in rows:
        target, measured = (f"{v:.0%}" if v is not None else "" for v in (row["sparsity"], row["measured_sparsity"]))
        lines.append(
            f"| {row['variant']} | {target} | {measured} | {row['median_ttft_ms']:.0f} | {row['median_tpot_ms']:.1f} "
            f"| {row['tokens_per_second']:.2f} | {row['tokens_per_second'] / rows[0]['tokens_per_second']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model directory or hub name")
    parser.add_argument("--adapter", type=Path, action="append", default=[], help="an adapter for it; may repeat")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of that shape instead of a model")
    parser.add_argument("--layers", type=int, help="with --shape: how many blocks of it; default all")
    parser.add_argument("--folder", type=Path, help="with --shape: keep the model there, and take it if it is there")
    parser.add_argument("--sparsity", default="0.5,0.7", help="with --shape; comma-separated")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--requests", type=int, default=4, help="measured in each round, after one to warm up")
    parser.add_argument("--rounds", type=int, default=1, help="how often each variant has its turn")
    parser.add_argument("--together", action="store_true", help="keep all servers up, where memory allows it")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("serve", nargs="*", help="after --: more arguments of vllm serve")
    own, extra = split_words(sys.argv[1:])
    arguments = parser.parse_args(own)
    arguments.serve = extra
    if bool(arguments.shape) == bool(arguments.model) or bool(arguments.model) != bool(arguments.adapter):
        parser.error("give a model with --adapter, or --shape")

    with tempfile.TemporaryDirectory() as temporary:
        folder, made = Path(temporary), arguments.folder or Path(temporary)
        model, adapters = arguments.model, list(arguments.adapter)
        if arguments.shape:
            if not (made / "base").exists():
                sparsities = [float(value) for value in arguments.sparsity.split(",")]
                write_random_model(made, arguments.shape, arguments.layers, sparsities, arguments.dtype)
            model, adapters = str(made / "base"), sorted(made.glob("spon*"))
        targets = [read_adapter(adapter).fields.sparsity for adapter in adapters]
        runs = measure_all(model, adapters, arguments, folder)
    rows = []
    for (adapter, done), target in zip(runs.items(), [None, *targets], strict=True):
        middle = {key: statistics.median(run[key] for run in done) for key in KEPT}
        rows.append({
            "variant": adapter.name if adapter else "dense", "sparsity": target, **middle,
            "measured_sparsity": done[-1]["measured_sparsity"],
            "tokens_per_second": 1000 / middle["median_tpot_ms"],
            "tokens_per_second_of_each_round": [1000 / run["median_tpot_ms"] for run in done],
        })  # fmt: skip
    print(table(rows))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "vllm": version("vllm"), "torch": torch.__version__,
            "model": arguments.shape or Path(arguments.model).name, "layers": arguments.layers,
            "dtype": arguments.dtype, "serve_arguments": extra,
            "environment": {k: v for k, v in os.environ.items() if k.startswith(("VLLM_CPU_", "OMP_"))},
            "rows": rows,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before ``--``, and those after it."""
    at = words.index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


if __name__ == "__main__":
    main()
