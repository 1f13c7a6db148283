# SPDX-License-Identifier: Apache-2.0
"""Where an engine's weights come from: loaded again, trained by the adapter as a whole, missing, or quantized."""

import shutil

import pytest
import torch
from engines import (
    DECODE,
    PROMPTS,
    engine,
    forced,
    generate,
    make_adapter,
    make_model,
    merge,
    override,
    peft_model,
    saving,
    with_prefix,
)
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of two bases, of an adapter for both, and the adapter; biases of q, k and v are the bases' own."""
    path = tmp_path_factory.mktemp("bases")
    models = [make_model(path / name, "Qwen2ForCausalLM", seed) for seed, name in enumerate(("first", "second"))]
    adapter = make_adapter(path / "adapter", models[0], path / "first")
    return path / "first", path / "second", path / "adapter", adapter


def load_again(llm, path):
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})


def test_adapter_on_weights_that_are_loaded_again(bases, tmp_path):
    first, second, plain, _ = bases
    head = {"lm_head.weight": 0.1 * torch.randn(256, 128, generator=torch.Generator().manual_seed(2))}
    adapter = saving(plain, tmp_path / "with-head", head)
    with engine(first, **override(adapter, token_mode="all")) as llm:
        tokens, logprobs = generate(llm)
        load_again(llm, second)
        new_tokens, new_logprobs = generate(llm)
    assert (logprobs - forced(peft_model(first, adapter), tokens)).abs().mean() <= 0.001
    assert (logprobs - forced(peft_model(first, plain), tokens)).abs().mean() > 0.05  # with the base's own head
    assert (new_logprobs - forced(peft_model(second, adapter), new_tokens)).abs().mean() <= 0.001


def test_merged_checkpoint_that_is_loaded_again(bases, tmp_path):
    first, second, _, adapter = bases
    source = with_prefix(adapter, tmp_path / "prefix1", 1)  # its merge holds the dense biases too
    merged = [merge(base, source, tmp_path / f"{base.name}-merged") for base in (first, second)]
    with engine(merged[0], hf_overrides={"quantization_config": {"quant_method": "spon", **DECODE}}) as llm:
        load_again(llm, merged[1])
        tokens, logprobs = generate(llm)
    expected = peft_model(second, with_prefix(adapter, tmp_path / "prefix12", len(PROMPTS[0])))
    assert (logprobs - forced(expected, tokens)).abs().mean() <= 0.001


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_missing_weights_are_named(bases, name, tmp_path):
    base, _, adapter, _ = bases
    shutil.copytree(base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=name), engine(tmp_path / "base", **override(adapter, token_mode="all")):
        pass
