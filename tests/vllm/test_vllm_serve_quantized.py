# SPDX-License-Identifier: Apache-2.0
"""The literal `vllm serve QUANTIZED --quantization spon`: blocks of SmolLM2 in the formats that people serve.

compressed-tensors makes its own; GPTQ's and AWQ's libraries do not install beside vLLM, so the tests write the formats.
"""

import copy
import json
import os
import shutil
import urllib.request
from functools import partial

import pytest
import torch
from engines import dense_model, forced, make_adapter, peft_model, with_int8_head
from openai import OpenAI
from quantized import awq, gptq
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.serve import serving
from spon_plugin import find_sites
from spon_plugin.calibration.text import offline_text
from spon_plugin.weights import weight_of

pytest.importorskip("compressed_tensors", reason="pip install 'spon-plugin[quantize]'")
pytestmark = pytest.mark.slow

BLOCKS, LENGTH, GROUP, VOCABULARY = 2, 16, 64, 8192


def compressed_tensors(model, path, **rounding):
    """Write `model` as `spon quantize` does, by compressed-tensors; returns it with the weights that this means."""
    from spon_transformers.quantize import Rounding, quantize, save_quantized

    meant = copy.deepcopy(model)
    quantize(model, Rounding(**rounding))
    shutil.rmtree(path)
    save_quantized(model, path)
    packed = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for name in (name for site in find_sites(meant) for name in site.modules):
            meant.get_submodule(name).weight.copy_(weight_of(packed.get_submodule(name)).dense().t())
    return meant


# Eight bits by one scale for an output, as vLLM's documentation has them; four by groups, as every library makes them.
FORMATS = {
    "W4A16": partial(compressed_tensors, bits=4, group=GROUP),
    "W8A16": partial(compressed_tensors, bits=8, group=None),
    "GPTQ": partial(gptq, group=GROUP),
    "AWQ": partial(awq, group=GROUP),
}


@pytest.fixture(scope="module")
def made(smollm2_dir, tmp_path_factory):
    """Two models of SmolLM2's first and next two blocks, its tokenizer, prompts, and an adapter of the first."""
    path = tmp_path_factory.mktemp("cut")
    tokenizer, cut = AutoTokenizer.from_pretrained(smollm2_dir), []
    whole = dense_model(smollm2_dir)
    whole.resize_token_embeddings(VOCABULARY)
    blocks = whole.model.layers
    for first in (0, BLOCKS):
        whole.model.layers, whole.config.num_hidden_layers = blocks[first : first + BLOCKS], BLOCKS
        model = copy.deepcopy(whole)
        for index, block in enumerate(model.model.layers):
            block.self_attn.layer_idx = index
        cut.append(model)
    ids = [token for token in tokenizer(offline_text()[:4000]).input_ids if token < VOCABULARY]
    prompts = [ids[start : start + LENGTH] for start in range(0, 8 * LENGTH, LENGTH)]
    make_adapter(path / "adapter", cut[0], path / "base", alpha=0.02, prompts=prompts)
    return cut, tokenizer, prompts, path / "adapter"


def answers(address, name, prompts):
    """Greedy tokens of the server and their logprobs, ``[prompts, LENGTH]``."""
    done = OpenAI(base_url=f"{address}/v1", api_key="none").completions.create(
        model=name, prompt=prompts, max_tokens=LENGTH, temperature=0, logprobs=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    logprobs = [choice.logprobs.token_logprobs for choice in done.choices]
    return torch.tensor([choice.token_ids for choice in done.choices]), torch.tensor(logprobs)


def check(said, meant, adapter, prompts):
    """As on a base in its own precision, with the head that a server rounds: see test_engine_says_what_peft_says."""
    tokens, logprobs = said
    meant.save_pretrained(path := adapter.with_name("meant"))
    reference = with_int8_head(peft_model(path, adapter))
    single, double = (forced(reference.to(d), tokens, prompts) for d in (torch.float32, torch.float64))
    noise = (single - double).abs().mean()
    assert (logprobs - double).abs().mean() <= 0.02 + 2 * noise
    assert (logprobs - double)[:, 0].abs().median() <= 1e-4
    assert (logprobs - forced(meant, tokens, prompts)).abs().mean() > 0.02 + 2 * noise


@pytest.mark.parametrize("name", FORMATS)
def test_server_says_what_peft_says_before_and_after_a_reload(name, made, tmp_path):
    cut, tokenizer, prompts, adapter = made
    bases, meant = [tmp_path / "first", tmp_path / "second"], []
    for model, base in zip(cut, bases, strict=True):
        model.save_pretrained(base)
        meant.append(FORMATS[name](copy.deepcopy(model), base))
        tokenizer.save_pretrained(base)
    source = {"quant_method": "spon", "adapter": str(adapter), "token_mode": "all", "exact": True}
    command = [str(bases[0]), "--quantization", "spon", "--hf-overrides", json.dumps({"quantization_config": source})]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "8"]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SPON_", "VLLM_ENABLE"))} | own
    log = tmp_path / "server.log"
    with serving(command, environment, log) as address:
        first = answers(address, str(bases[0]), prompts)
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(bases[1])}}
        headers = {"Content-Type": "application/json"}
        call = urllib.request.Request(f"{address}/collective_rpc", json.dumps(body).encode(), headers)
        urllib.request.urlopen(call, timeout=300)
        second = answers(address, str(bases[0]), prompts)
    lines = [line for line in log.read_text().splitlines() if "SPON: adapter" in line]
    bits = 8 if "8" in name else 4
    assert len(lines) == 1 and f"weights: {4 * BLOCKS} layers of int{bits} in rows" in lines[0]
    assert "output head in int8 (4.5 MiB, beside the embedding of 18.0)" in lines[0]
    for said, model in ((first, meant[0]), (second, meant[1])):
        check(said, model, adapter, prompts)
