# SPDX-License-Identifier: Apache-2.0
"""The literal `vllm serve` command on SmolLM2 with an adapter of `spon train`, asked by the openai client."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from engines import dense_model, engine, forced, generate, override, peft_model, with_prefix
from openai import OpenAI

from benchmarks.vllm_perplexity import references, vllm_perplexity
from spon_plugin import read_adapter, sparse_inputs, write_adapter
from spon_plugin.calibration.text import leading_windows, offline_text

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("SPON_", "VLLM_"))},
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def adapter(smollm2_dir, tmp_path_factory):
    """An adapter that `spon train` makes in half a minute: right for the plumbing, poor in quality."""
    path = tmp_path_factory.mktemp("adapters") / "spon50"
    command = [BIN / "spon", "train", smollm2_dir, "--sparsity", "0.5", "-o", path, "--windows", "8"]
    command += ["--window", "128", "--batch-size", "2"]
    subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, text=True)
    return path


@contextmanager
def serve(log: Path, *arguments, **environment):
    """`vllm serve ARGUMENTS`; yields the address once it is healthy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [BIN / "vllm", "serve", *map(str, arguments), "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "512", "--max-num-seqs", "4"]
    with log.open("w") as out:
        process = subprocess.Popen(command, env={**ENVIRONMENT, **environment}, stdout=out, stderr=out)
    try:
        end = time.monotonic() + SECONDS
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def ways(smollm2_dir, adapter, merged):
    quantization = {"quant_method": "spon", "adapter": str(adapter)}
    return {
        "checkpoint": ([merged], {}),
        "hf-overrides": (
            [
                smollm2_dir,
                "--quantization",
                "spon",
                "--hf-overrides",
                json.dumps({"quantization_config": quantization}),
            ],
            {},
        ),
        "adapter directory": ([adapter], {}),
        "SPON_ADAPTER": ([smollm2_dir], {"SPON_ADAPTER": str(adapter)}),
    }


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    path = tmp_path_factory.mktemp("merged") / "model"
    subprocess.run([BIN / "spon", "merge", adapter, "-o", path], check=True, env=ENVIRONMENT, capture_output=True)
    return path


@pytest.mark.parametrize("way", ways("", "", ""))
def test_server_answers(way, smollm2_dir, adapter, merged, tmp_path):
    arguments, environment = ways(smollm2_dir, adapter, merged)[way]
    log = tmp_path / "server.log"
    with serve(log, *arguments, **environment) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        name = client.models.list().data[0].id
        assert name == str(arguments[0])
        text = client.completions.create(model=name, prompt="The capital of France is", max_tokens=16, temperature=0)
        assert text.choices[0].text.strip() and text.usage.completion_tokens == 16
        message = [{"role": "user", "content": "Name three colours, please, and say why you like each of them."}]
        chat = client.chat.completions.create(model=name, messages=message, max_tokens=24, temperature=0)
        assert chat.choices[0].message.content.strip()
        time.sleep(1.5)  # counters travel once in a second
        client.completions.create(model=name, prompt="Once upon a time", max_tokens=8, temperature=0)
        metrics = urllib.request.urlopen(f"{address}/metrics").read().decode()
    counted = {key: float(value) for key, value in re.findall(r"^spon:(\w+)_total (\S+)$", metrics, re.M)}
    assert counted["sparse_calls"] >= 120 * 16
    assert counted["dense_calls"] >= 120  # the chat's prompt
    assert 0.3 < counted["sampled_zeroed"] / counted["sampled_inputs"] < 0.7
    lines = [line for line in log.read_text().splitlines() if "SPON: adapter" in line]
    assert len(lines) == 1 and read_adapter(adapter).digest[:12] in lines[0]
    assert "target sparsity 50%, 210 linears in 120 layers, tokens: decode" in lines[0]


def test_bare_quantization_is_an_error_of_the_command(smollm2_dir):
    command = [BIN / "vllm", "serve", smollm2_dir, "--quantization", "spon"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS)
    output = result.stdout + result.stderr
    assert result.returncode != 0 and "a SPON adapter for --quantization spon" in output and "SPON_ADAPTER" in output
    assert "EngineCore" not in output  # refused before an engine starts


def test_engine_says_what_peft_says(smollm2_dir, adapter, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    ids = tokenizer(offline_text()[:40000], return_tensors="pt").input_ids[0]
    prompts = [ids[start : start + 8].tolist() for start in range(100, 7300, 300)]
    with engine(smollm2_dir, **override(adapter, token_mode="all")) as llm:
        tokens, logprobs = generate(llm, prompts, count=16)
    unprefixed = with_prefix(read_adapter(adapter), tmp_path / "unprefixed", 0)  # mode all masks position 0 too
    model = peft_model(smollm2_dir, unprefixed)
    single = forced(model, tokens, prompts)
    double = forced(model.double(), tokens, prompts)
    # A rounding error that moves one input across its threshold moves everything after it, so PEFT in float32 is as far
    # from PEFT in float64 as vLLM is from either: that distance is the yardstick. Where nothing flips, they agree, and
    # few inputs have flipped by the first token of an answer.
    noise = (single - double).abs().mean()
    assert (logprobs - double).abs().mean() <= 0.02 + 2 * noise
    assert (logprobs - double)[:, 0].abs().median() <= 1e-4
    assert (logprobs - forced(dense_model(smollm2_dir), tokens, prompts)).abs().mean() > 0.02 + 2 * noise


def test_perplexity_is_that_of_the_reference(smollm2_dir, adapter, tmp_path):
    from transformers import AutoTokenizer

    windows = leading_windows(AutoTokenizer.from_pretrained(smollm2_dir), offline_text("test"), 256, 4 * 256)
    loaded = read_adapter(adapter)
    single, teal = dense_model(smollm2_dir), loaded.without_alpha()
    rows = references(single, loaded, windows)
    write_adapter(teal, tmp_path / "teal")
    sources = {
        "dense": {},
        "teal": override(tmp_path / "teal", token_mode="all"),
        "spon": override(adapter, token_mode="all"),
    }
    near = {"dense": 1e-4}
    # Rounding flips masks, which moves every token's loss to and fro: as far as float32 is from float64.
    double = dense_model(smollm2_dir).double()
    for name, masks in (("teal", teal.masks), ("spon", loaded.masks)):
        moved = losses(single, masks, windows) - losses(double, masks, windows)
        near[name] = 4 * float(moved.std()) / moved.numel() ** 0.5
        assert near[name] < 0.1, near
    for name, source in sources.items():
        with engine(smollm2_dir, max_model_len=512, **source) as llm:
            measured = vllm_perplexity(llm, windows)
        assert abs(math.log(measured / rows[name]["all"])) < near[name], (name, measured, rows, near)
    assert 1.1 * rows["dense"]["all"] < min(rows["spon"]["all"], rows["teal"]["all"])


@torch.no_grad()
def losses(model, masks, windows):
    """Of every prediction, every position masked."""
    with sparse_inputs(model, masks, 0):
        logits = torch.cat([model(input_ids=window[None]).logits[0, :-1] for window in windows])
    return torch.nn.functional.cross_entropy(logits.double(), windows[:, 1:].flatten(), reduction="none")


def test_the_example_runs_as_it_stands(smollm2_dir, adapter, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**ENVIRONMENT, "PORT": str(port), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", ROOT / "examples" / "serve.sh", smollm2_dir, adapter, "--enforce-eager"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert re.search(r"^spon:sparse_calls_total [1-9]", done.stdout, re.M)
    rows = re.findall(r"^\| (dense|spon50) \|.* (\d+\.\d\d) \| (\d+\.\d\d) \|$", done.stdout, re.M)
    assert [row[0] for row in rows] == ["dense", "spon50"] and rows[0][2] == "1.00"
    with socket.socket() as free:
        free.bind(("127.0.0.1", port))  # nothing is left behind
