# SPDX-License-Identifier: Apache-2.0
"""What an engine computes, against PEFT in float32, on tiny models."""

import logging

import pytest
import torch
from engines import (
    DECODE,
    PROMPTS,
    dense_model,
    engine,
    forced,
    generate,
    make_adapter,
    make_model,
    merge,
    override,
    peft_model,
    with_prefix,
)

pytestmark = pytest.mark.slow

LENGTH = len(PROMPTS[0])
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
    """What PEFT says with that many dense positions: 0 for mode ``all``, the prompt's length for ``decode``."""
    path = with_prefix(adapter, adapter_dir.with_name(f"{adapter_dir.name}-prefix{dense_prefix}"), dense_prefix)
    return forced(peft_model(base, path), tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_model_is_that_of_peft(made, kind):
    base, adapter_dir, adapter = made(kind)
    with engine(base, **override(adapter_dir, token_mode="all")) as llm:
        tokens, logprobs = generate(llm)
    assert (logprobs - reference(base, adapter_dir, adapter, tokens, 0)).abs().mean() <= 0.001
    assert (logprobs - forced(dense_model(base), tokens)).abs().mean() > 0.05


def test_decode_leaves_the_context_dense(made):
    base, adapter_dir, adapter = made()
    with engine(base, **override(adapter_dir, **DECODE)) as llm:
        tokens, logprobs = generate(llm)
    assert (logprobs - reference(base, adapter_dir, adapter, tokens, LENGTH)).abs().mean() <= 0.001
    assert torch.allclose(logprobs[:, 0], forced(dense_model(base), tokens)[:, 0], atol=1e-4)


def test_decode_is_dense_above_the_limit(made):
    base, adapter_dir, _ = made("qwen2, own biases")
    with engine(base, **override(adapter_dir, token_mode="decode", max_sparse_tokens=7)) as llm:
        tokens, logprobs = generate(llm)  # eight sequences at a time
    assert (logprobs - forced(dense_model(base), tokens)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("llama", "all"),
        ("qwen2, own biases", "decode"),
        ("phi3, fused on disk", "decode"),
        ("opt, biases everywhere", "decode"),
        ("opt, biases everywhere", "all"),
    ],
)
def test_merged_checkpoint_serves(made, kind, mode, tmp_path):
    base, adapter_dir, adapter = made(kind)
    source = with_prefix(adapter, adapter_dir.with_name("adapter-prefix1"), 1)  # its merge holds the dense biases too
    merged = merge(base, source, tmp_path / "merged")
    quantization = {"quant_method": "spon", **DECODE, "token_mode": mode}
    with engine(merged, hf_overrides={"quantization_config": quantization}) as llm:
        tokens, logprobs = generate(llm)
    expected = reference(base, adapter_dir, adapter, tokens, 0 if mode == "all" else LENGTH)
    assert (logprobs - expected).abs().mean() <= 0.001


def test_zero_adapter_is_the_dense_model(made, tmp_path):
    base, _, _ = made()
    make_adapter(tmp_path / "zero", dense_model(base), base, sparsity=0, alpha=0)
    with engine(base) as llm:
        tokens, logprobs = generate(llm)
    with engine(base, **override(tmp_path / "zero", token_mode="all")) as llm:
        ours, our_logprobs = generate(llm)
    assert torch.equal(ours, tokens)
    assert (our_logprobs - logprobs).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["llama", "qwen2, own biases"])
def test_biases_alone_are_those_of_peft(made, kind, tmp_path):
    base, _, _ = made(kind)
    make_adapter(tmp_path / "bias", dense_model(base), base, sparsity=0, alpha=0.3)
    with engine(base, **override(tmp_path / "bias", token_mode="all")) as llm:
        tokens, logprobs = generate(llm)
    assert (logprobs - forced(peft_model(base, tmp_path / "bias"), tokens)).abs().max() <= 1e-4
    assert (logprobs - forced(dense_model(base), tokens)).abs().mean() > 0.05


def test_thresholds_may_differ_within_a_fused_layer(made, tmp_path):
    base, _, _ = made()
    make_adapter(tmp_path / "each", dense_model(base), base, sparsity=0.3, per_linear=True)
    with engine(base, **override(tmp_path / "each", token_mode="all")) as llm:
        tokens, logprobs = generate(llm)
    assert (logprobs - forced(peft_model(base, tmp_path / "each"), tokens)).abs().mean() <= 0.001


def test_teal_adapter_without_alphas(made, tmp_path):
    base, _, adapter = made()
    from spon_plugin import write_adapter

    write_adapter(adapter.without_alpha(), tmp_path / "teal")
    with engine(base, **override(tmp_path / "teal", token_mode="all")) as llm:
        tokens, logprobs = generate(llm)
    assert (logprobs - forced(peft_model(base, tmp_path / "teal"), tokens)).abs().mean() <= 0.001


def test_adapter_on_some_layers_leaves_the_others_plain(made, tmp_path):
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from spon_vllm.linear import SponLinearMethod

    base, _, _ = made()
    make_adapter(tmp_path / "down", dense_model(base), base, targets=["down_proj"])
    with engine(base, **override(tmp_path / "down", token_mode="all")) as llm:
        kinds = llm.apply_model(
            lambda model: {
                name: type(m.quant_method) for name, m in model.named_modules() if hasattr(m, "quant_method")
            }
        )[0]
        tokens, logprobs = generate(llm)
    assert kinds["model.layers.0.mlp.down_proj"] is SponLinearMethod
    assert kinds["model.layers.0.mlp.gate_up_proj"] is UnquantizedLinearMethod
    assert (logprobs - forced(peft_model(base, tmp_path / "down"), tokens)).abs().mean() <= 0.001


def test_startup_line_and_counters(made, caplog):
    from spon_vllm.metrics import COUNTERS

    base, adapter_dir, adapter = made()
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.INFO, "vllm.spon"), engine(base, **override(adapter_dir, token_mode="all")) as llm:
        before = COUNTERS.values()
        generate(llm)
        counted = {name: value - before[name] for name, value in COUNTERS.values().items()}
    line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("SPON: adapter"))
    extra = 4 * 2 * (3 * 64 + 64 + 2 * 256 + 128 + 128 - 128 + 4)
    assert f"adapter {adapter_dir}, digest {adapter.digest[:12]}, target sparsity 50%" in line
    assert "14 linears in 8 layers, tokens: all" in line
    assert counted["spon:sparse_calls"] == 8 * 32 and counted["spon:dense_calls"] == 0
    share = counted["spon:sampled_zeroed"] / counted["spon:sampled_inputs"]
    assert 0.35 < share < 0.65, share
    assert f"{extra / 2**20:.2f} MiB" in line or "MiB per worker" in line
