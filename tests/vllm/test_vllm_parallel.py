# SPDX-License-Identifier: Apache-2.0
"""Tensor and pipeline parallel engines compute what one worker computes."""

from dataclasses import replace

import pytest
import torch
from engines import (
    dense_model,
    engine,
    forced,
    generate,
    make_adapter,
    make_model,
    merge,
    override,
    with_prefix,
)
from transformers import AutoTokenizer

from spon_plugin import write_adapter
from spon_plugin.calibration.text import offline_text

pytestmark = pytest.mark.slow


@pytest.fixture
def workers(monkeypatch):
    """Worker processes on a machine with few cores."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def test_parallel_engines(tmp_path, workers):
    base = tmp_path / "base"  # own biases of q, k and v, and of row-parallel o
    model = make_model(base, "LlamaForCausalLM", attention_bias=True, mlp_bias=True)
    adapter = make_adapter(tmp_path / "adapter", model, base, per_linear=True, sparsity=0.3)
    merged = merge(base, with_prefix(adapter, tmp_path / "prefix1", 1), tmp_path / "merged")
    ways = {
        "adapter": (base, override(tmp_path / "adapter", token_mode="all")),
        "merged": (merged, {"hf_overrides": {"quantization_config": {"quant_method": "spon", "token_mode": "all"}}}),
    }
    with engine(base, **ways["adapter"][1]) as llm:
        tokens, logprobs = generate(llm)
    # vLLM 0.32's CPU worker makes a later stage's input buffers while it compiles, so stages cannot run eagerly there.
    sizes = [
        ("adapter", {"tensor_parallel_size": 2}),
        ("merged", {"tensor_parallel_size": 2}),
        ("adapter", {"pipeline_parallel_size": 2, "enforce_eager": False}),
    ]
    for name, size in sizes:
        path, source = ways[name]
        with engine(path, **source, **size) as llm:
            ours, our_logprobs = generate(llm)
        assert torch.equal(ours, tokens), (name, size)
        assert (our_logprobs - logprobs).abs().mean() <= 0.001


def test_smollm2_on_three_workers(smollm2_dir, tmp_path, workers):
    """Nine heads and three key-value heads, so three workers."""
    ids = AutoTokenizer.from_pretrained(smollm2_dir)(offline_text()[:40000]).input_ids
    prompts = [ids[start : start + 16] for start in range(100, 8100, 1000)]
    # Biases everywhere, masks in two blocks: over all thirty, another order of summation moves some input across its
    # threshold in most prompts, and every token after it. There the tests on tiny models are sharper.
    adapter = make_adapter(tmp_path / "all", dense_model(smollm2_dir), smollm2_dir, sparsity=0.5, alpha=0.02)
    for name, mask in adapter.masks.items():
        if ".layers.0." not in name and ".layers.15." not in name:
            adapter.masks[name] = replace(mask, threshold=torch.zeros(1))
    write_adapter(adapter, tmp_path / "two")
    with engine(smollm2_dir, **override(tmp_path / "two", token_mode="all")) as llm:
        tokens, logprobs = generate(llm, prompts, count=16)
    assert (logprobs - forced(dense_model(smollm2_dir), tokens, prompts)).abs().mean() > 0.1
    with engine(smollm2_dir, **override(tmp_path / "two", token_mode="all"), tensor_parallel_size=3) as llm:
        ours, our_logprobs = generate(llm, prompts, count=16)
    assert torch.equal(ours, tokens)
    assert (our_logprobs - logprobs).abs().mean() <= 0.01
