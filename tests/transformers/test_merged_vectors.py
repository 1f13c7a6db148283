# SPDX-License-Identifier: Apache-2.0
"""Merged checkpoints whose linears have thresholds per channel and centres."""

import json

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spon_peft import SponConfig, collect_adapter
from spon_plugin import SparseConv1D, SparseLinear, SponError, sparse_inputs
from spon_plugin.kernels.cpu import kernel as cpu

LLAMA = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
KINDS = {
    "LlamaForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "GPT2LMHeadModel": dict(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64),
}
VECTORS = {
    "channel": dict(channel_modules="all"),
    "centre": dict(center_modules="all"),
    "both": dict(channel_modules="all", center_modules="all"),
    "some": dict(channel_modules=["q_proj", "c_attn"], center_modules=["down_proj", "c_proj"]),
}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def ids():
    torch.manual_seed(3)
    return torch.randint(1, 64, (2, 9))


@torch.no_grad()
def logits(model):
    return model(input_ids=ids()).logits


def base(kind="LlamaForCausalLM", dtype=torch.float32):
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**KINDS[kind])).eval()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.dim() == 2 else 1)
    model.to(dtype)
    for name, value in buffers.items():  # from_pretrained leaves the rotary embedding's in float32
        model.get_buffer(name).data = value
    return model


def merged(kind="LlamaForCausalLM", dtype=torch.float32, **config):
    """The merged model and its adapter."""
    torch.manual_seed(5)
    model = get_peft_model(base(kind, dtype), SponConfig(init_weights=False, **config)).eval()
    adapter = collect_adapter(model)
    return model.merge_and_unload(), adapter


def sparse_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear | SparseConv1D)}


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_keeps_every_bit(kind, dtype, prefix, vectors, tmp_path):
    model, adapter = merged(kind, dtype, dense_prefix=prefix, **VECTORS[vectors])
    expected = logits(model)
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
    assert loaded.dtype == dtype and torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", device_map="cpu", low_cpu_mem_usage=True, dtype="auto")
    assert torch.equal(logits(again), expected)
    assert sparse_layers(again).keys() == adapter.masks.keys()
    for path, layer in sparse_layers(again).items():
        assert layer.spon_threshold.dtype == torch.float32 and torch.equal(
            layer.spon_threshold, adapter.masks[path].threshold
        )
        center = adapter.masks[path].center
        assert (layer.spon_center is None) == (center is None)
        if center is not None:
            assert layer.spon_center.dtype == torch.float32 and torch.equal(layer.spon_center, center)
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_same_as_the_core(dtype, prefix, vectors, tmp_path):
    model, adapter = merged(dtype=dtype, dense_prefix=prefix, **VECTORS[vectors])
    model.save_pretrained(tmp_path)
    dense = base(dtype=dtype)
    with sparse_inputs(dense, adapter.masks, prefix):
        expected = logits(dense)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_loading_in_half_precision_rounds_neither_thresholds_nor_centres(dtype, tmp_path):
    model, adapter = merged(**VECTORS["both"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    for path, layer in sparse_layers(loaded).items():
        assert torch.equal(layer.spon_threshold, adapter.masks[path].threshold)
        assert torch.equal(layer.spon_center, adapter.masks[path].center)


def test_config_says_what_stands_in_the_weights_file(tmp_path):
    merged(**VECTORS["some"])[0].save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {path for path, value in stored["thresholds"].items() if value is None} == {Q, Q.replace("0", "1")}
    assert stored["center_modules"] == ["down_proj"] and "centered" not in stored
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors[f"{Q}.spon_threshold"].shape == (16,) and tensors[f"{DOWN}.spon_center"].shape == (24,)
    assert f"{Q}.spon_center" not in tensors


def test_generation_takes_the_kernel_and_gives_the_same(tmp_path, monkeypatch):
    merged(dense_prefix=1, **VECTORS["both"])[0].save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = dict(
        max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None
    )
    ours = model.generate(input_ids=ids(), **settings)
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    for layer in sparse_layers(plain).values():
        assert layer.weight.t().is_contiguous()
        layer.weight.data = layer.weight.data.contiguous()
    theirs = plain.generate(input_ids=ids(), **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)


def test_a_rounded_vector_is_refused():
    from spon_plugin.adapter.merged import check_vector

    check_vector(Q, "spon_center", torch.zeros(16), 16)
    with pytest.raises(SponError, match=f"{Q}.spon_center: got torch.bfloat16, expected torch.float32"):
        check_vector(Q, "spon_center", torch.zeros(16, dtype=torch.bfloat16), 16)


def edit_config(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


WRONG = {
    "no centres in the config": (edit_config, lambda c: c.update(center_modules="down_proj"), "center_modules: got"),
    "missing threshold": (edit_tensors, lambda t: t.pop(f"{Q}.spon_threshold"), f"{Q}.spon_threshold: got 'no such"),
    "missing centre": (edit_tensors, lambda t: t.pop(f"{DOWN}.spon_center"), f"{DOWN}.spon_center: got 'no such"),
    "announced only": (edit_config, lambda c: c["thresholds"].update({DOWN: None}), r"spon_threshold: got \(1,\)"),
    "length": (
        edit_tensors,
        lambda t: t.update({f"{DOWN}.spon_center": torch.zeros(9)}),
        r"spon_center: got \(9,\), expected shape \(24,\)",
    ),
    "negative": (edit_tensors, lambda t: t[f"{Q}.spon_threshold"].neg_(), f"{Q}.spon_threshold.*finite values >= 0"),
    "nan": (edit_tensors, lambda t: t[f"{DOWN}.spon_center"].fill_(float("nan")), f"{DOWN}.spon_center.*finite"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_broken_checkpoint_is_refused(wrong, tmp_path):
    merged(**VECTORS["some"])[0].save_pretrained(tmp_path)
    edit, change, message = WRONG[wrong]
    edit(tmp_path, change)
    with pytest.raises(SponError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
