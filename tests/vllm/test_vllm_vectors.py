# SPDX-License-Identifier: Apache-2.0
"""Thresholds per channel and centres: what an engine computes with them, against PEFT in float32."""

from dataclasses import replace
from pathlib import Path

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
from quantized import gptq, layer_errors, w8a8
from safetensors.torch import load_file, save_file

from spon_plugin import Adapter, find_sites, write_adapter

LENGTH = len(PROMPTS[0])
KINDS = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2, own biases": ("Qwen2ForCausalLM", {}),
    "phi3, fused on disk": ("Phi3ForCausalLM", {"pad_token_id": 0}),
    "opt, biases everywhere": (
        "OPTForCausalLM",
        {"ffn_dim": 256, "word_embed_proj_dim": 128, "tie_word_embeddings": True},
    ),
}


def make_vectors(path: Path, model, base: Path, per_linear=True, **changes) -> Adapter:
    """An adapter with thresholds per channel, other ones for each linear of a site or not, and a centre per site.

    The linears that read the attention's output keep one threshold, and those of the first site have no centre.
    """
    adapter = make_adapter(path.with_name(path.name + "-plain"), model, base, **changes)
    generator = torch.Generator().manual_seed(7)
    for index, site in enumerate(find_sites(model)):
        center, threshold = (torch.randn(site.in_features, generator=generator) for _ in range(2))
        center = center * adapter.masks[site.modules[0]].threshold / 2
        for number, name in enumerate(site.modules):
            mask = adapter.masks[name]
            if site.role != "attn_out":
                scale = threshold.abs() if number == 0 or not per_linear else threshold.roll(number).abs()
                mask = replace(mask, threshold=mask.threshold * scale)
            adapter.masks[name] = replace(mask, center=center) if index else mask
    write_adapter(adapter, path)
    return adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(kind) -> directory of the base, directory of its adapter, the adapter; made once."""
    cache = {}

    def get(kind="llama"):
        if kind not in cache:
            path = tmp_path_factory.mktemp("made")
            model = make_model(path / "base", KINDS[kind][0], **KINDS[kind][1])
            cache[kind] = path / "base", path / "adapter", make_vectors(path / "adapter", model, path / "base")
        return cache[kind]

    return get


def reference(base, adapter_dir, adapter, tokens, mode):
    prefix = 0 if mode == "all" else LENGTH
    path = with_prefix(adapter, adapter_dir.with_name(f"{adapter_dir.name}-prefix{prefix}"), prefix)
    return forced(peft_model(base, path), tokens)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["all", "decode"])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_model_is_that_of_peft(made, kind, mode):
    base, adapter_dir, adapter = made(kind)
    with engine(base, **override(adapter_dir, **{**DECODE, "token_mode": mode})) as llm:
        tokens, logprobs = generate(llm)
    assert (logprobs - reference(base, adapter_dir, adapter, tokens, mode)).abs().mean() <= 0.001
    assert (logprobs - forced(dense_model(base), tokens)).abs().mean() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("llama", "all"),
        ("qwen2, own biases", "decode"),
        ("phi3, fused on disk", "decode"),
        ("opt, biases everywhere", "all"),
    ],
)
def test_merged_checkpoint_serves(made, kind, mode, tmp_path):
    base, adapter_dir, adapter = made(kind)
    source = with_prefix(adapter, adapter_dir.with_name("adapter-prefix1"), 1)
    merged = merge(base, source, tmp_path / "merged")
    quantization = {"quant_method": "spon", **DECODE, "token_mode": mode}
    with engine(merged, hf_overrides={"quantization_config": quantization}) as llm:
        tokens, logprobs = generate(llm)
    assert (logprobs - reference(base, adapter_dir, adapter, tokens, mode)).abs().mean() <= 0.001


@pytest.mark.slow
def test_one_mask_for_a_fused_layer(made, tmp_path):
    base, _, _ = made()
    make_vectors(tmp_path / "shared", dense_model(base), base, per_linear=False)
    with engine(base, **override(tmp_path / "shared", token_mode="all")) as llm:
        tokens, logprobs = generate(llm)
        shapes = llm.apply_model(
            lambda model: {
                n: tuple(m.spon_threshold.shape) for n, m in model.named_modules() if hasattr(m, "spon_bias")
            }
        )[0]
    assert (logprobs - forced(peft_model(base, tmp_path / "shared"), tokens)).abs().mean() <= 0.001
    assert shapes["model.layers.1.self_attn.qkv_proj"] == (1, 128)
    assert shapes["model.layers.1.self_attn.o_proj"] == (1,)


@pytest.mark.slow
def test_compiled_engine(made):
    base, adapter_dir, adapter = made()
    with engine(base, **override(adapter_dir, **DECODE), enforce_eager=False) as llm:
        tokens, logprobs = generate(llm, count=16)
    assert (logprobs - reference(base, adapter_dir, adapter, tokens, "decode")).abs().mean() <= 0.001


@pytest.mark.slow
def test_parallel_engines(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    base = tmp_path / "base"
    model = make_model(base, "LlamaForCausalLM", attention_bias=True, mlp_bias=True)
    adapter = make_vectors(tmp_path / "adapter", model, base)
    merged = merge(base, with_prefix(adapter, tmp_path / "prefix1", 1), tmp_path / "merged")
    ways = {
        "adapter": (base, override(tmp_path / "adapter", token_mode="all")),
        "merged": (merged, {"hf_overrides": {"quantization_config": {"quant_method": "spon", "token_mode": "all"}}}),
    }
    for name, (path, source) in ways.items():
        with engine(path, **source, tensor_parallel_size=2) as llm:
            tokens, logprobs = generate(llm)
        assert (logprobs - forced(peft_model(base, tmp_path / "adapter"), tokens)).abs().mean() <= 0.001, name


@pytest.mark.slow
@pytest.mark.parametrize("per_linear", [False, True], ids=["by site", "by linear"])
@pytest.mark.parametrize("quantize", [gptq, w8a8])
def test_quantized_base(tmp_path, quantize, per_linear):
    model = quantize(make_model(tmp_path / "base"), tmp_path / "base")
    model.save_pretrained(tmp_path / "meant")
    make_vectors(tmp_path / "adapter", model, tmp_path / "base", per_linear, sparsity=0.4)
    ours = peft_model(tmp_path / "meant", tmp_path / "adapter").merge_and_unload()
    source = override(tmp_path / "adapter", token_mode="all")
    with engine(tmp_path / "base", dtype="bfloat16", **source) as llm:
        errors = llm.apply_model(lambda served: layer_errors(served, ours, torch.bfloat16))[0]
    assert len(errors) == 8 and max(errors.values()) < 0.03, errors


def configure(model, **arguments):
    """Make vLLM's configuration, as every server does before it starts an engine."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return EngineArgs(model=str(model), max_model_len=256, dtype="float32", **arguments).create_engine_config()


Q, K = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize("wrong", ["another", "none"])
def test_centres_that_differ_in_a_fused_layer_are_refused_at_configuration_time(made, wrong, tmp_path):
    base, _, adapter = made()
    masks = dict(adapter.masks)
    if wrong == "another":
        masks[K] = replace(masks[K], center=masks[K].center + 1)
        message = r"k_proj\.spon_center: got 'another than .*q_proj has'.*qkv_proj, on one input.*per input site"
    else:
        masks[K] = replace(masks[K], center=None)
        message = r"k_proj\.spon_center: got 'none, but .*q_proj has one'.*qkv_proj, on one input.*per input site"
    path = write_adapter(replace(adapter, masks=masks), tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        configure(base, **override(path))
    if wrong == "none":
        merged = merge(base, path, tmp_path / "merged")
        with pytest.raises(ValueError, match=message):
            configure(merged)


def test_vectors_for_another_model_are_refused_at_configuration_time(made, tmp_path):
    base, _, _ = made()
    other = make_model(tmp_path / "other", hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    make_vectors(tmp_path / "adapter", other, tmp_path / "other", alpha_modules=[])
    with pytest.raises(ValueError, match=r"spon_center: got \(64,\), expected shape \(128,\).*was made for .*other"):
        configure(base, **override(tmp_path / "adapter"))


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["missing threshold", "missing centre", "another centre"])
def test_broken_merged_checkpoint_is_refused(made, wrong, tmp_path):
    base, adapter_dir, _ = made()
    merged = merge(base, adapter_dir, tmp_path / "merged")
    tensors = load_file(merged / "model.safetensors")
    if wrong == "another centre":
        tensors[f"{K}.spon_center"] = tensors[f"{K}.spon_center"] + 1
    else:
        del tensors[f"{K}.spon_{'threshold' if wrong == 'missing threshold' else 'center'}"]
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    message = "another than" if wrong == "another centre" else rf"{K}\.spon_.*finite"
    with pytest.raises(Exception, match=message), engine(merged):
        pass
