# SPDX-License-Identifier: Apache-2.0
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spon_transformers
from spon_peft import SponConfig, collect_adapter
from spon_plugin import SparseConv1D, SparseLinear, SponError
from spon_plugin.kernels.cpu import kernel as cpu
from spon_transformers.quantizer import SponQuantizationConfig, make_quantizer

LLAMA = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
KINDS = {
    "LlamaForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "GPT2LMHeadModel": dict(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "OPTForCausalLM": dict(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16
    ),
}
PATH = "model.layers.0.mlp.down_proj"


def ids():
    torch.manual_seed(3)
    return torch.randint(1, 64, (2, 9))


@torch.no_grad()
def logits(model):
    return model(input_ids=ids()).logits


def merged(kind="LlamaForCausalLM", dtype=torch.float32, **config):
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**KINDS[kind])).eval()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.dim() == 2 else 1)
    model.to(dtype)
    for name, value in buffers.items():  # from_pretrained leaves the rotary embedding's in float32
        model.get_buffer(name).data = value
    return get_peft_model(model, SponConfig(init_weights=False, **config)).eval().merge_and_unload()


def sparse_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear | SparseConv1D)}


@pytest.fixture
def saved(tmp_path):
    merged(dense_prefix=0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_keeps_every_bit(kind, dtype, prefix, tmp_path):
    model = merged(kind, dtype, dense_prefix=prefix)
    expected = logits(model)
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
    assert loaded.dtype == dtype and torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", device_map="cpu", low_cpu_mem_usage=True, dtype="auto")
    assert torch.equal(logits(again), expected)
    for path, layer in sparse_layers(model).items():
        threshold = again.get_submodule(path).spon_threshold
        assert threshold.dtype == torch.float32 and torch.equal(threshold, layer.spon_threshold)
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


def test_a_multimodal_model_comes_back(tmp_path):
    """transformers saves its tensors under other names than its modules have."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = transformers.LlamaConfig(**LLAMA)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.dim() == 2 else 1)
    model = get_peft_model(model, SponConfig(init_weights=False, center_modules="all", channel_modules="all"))
    model = model.eval().merge_and_unload()
    model.save_pretrained(tmp_path)
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert len(sparse_layers(loaded)) == len(sparse_layers(model)) == 14
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-4)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.spon_center"))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SponError, match=r"layers.1.mlp.down_proj.spon_center: got 'no such tensor'"):
        transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_decode_round_trip(tmp_path):
    model = merged(tokens="decode", dense_prefix=0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = dict(
        max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None
    )
    ours, theirs = (m.generate(input_ids=ids(), **settings) for m in (model, loaded))
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-5, atol=1e-5)
    every_token = logits(merged(tokens="all", dense_prefix=0))
    assert not torch.allclose(ours.logits[0], every_token[:, -1], atol=1e-2)


@torch.no_grad()
def rearranged(model):
    """The same model with its weights as a plain linear has them, so that its layers mask and multiply densely."""
    plain = copy.deepcopy(model)
    for layer in sparse_layers(plain).values():
        assert layer.weight.t().is_contiguous()
        layer.weight.data = layer.weight.data.contiguous()
    return plain


def test_decoding_runs_the_sparse_kernel_and_generates_the_same(tmp_path, monkeypatch):
    merged(dense_prefix=1).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = dict(
        max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None
    )
    plain = rearranged(model).generate(input_ids=ids(), **settings)
    calls, launch = [], cpu.launch
    monkeypatch.setattr(cpu, "launch", lambda *args: calls.append(1) or launch(*args))
    ours = model.generate(input_ids=ids(), **settings)
    assert torch.equal(ours.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    # The first step is the prompt, whose first token is dense; each of the others runs every layer once.
    assert len(calls) == (4 * len(sparse_layers(model)) if cpu.is_available() else 0)


@torch.no_grad()
@pytest.mark.parametrize("prefix", [0, 1])
def test_compiled_model_agrees_at_prefill_and_at_a_decode_step(prefix):
    model = merged(dense_prefix=prefix)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    results = []
    for run in (model, compiled):
        prompt = run(input_ids=ids(), use_cache=True)
        step = run(input_ids=ids()[:, :1], past_key_values=prompt.past_key_values, use_cache=True)
        results.append((prompt.logits, step.logits))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_thresholds_come_from_the_config(saved):
    edit(saved, lambda c: c["thresholds"].update({PATH: 0.1234567}))
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    threshold = model.get_submodule(PATH).spon_threshold
    assert threshold.dtype == torch.float32 and threshold.item() == torch.tensor(0.1234567).item()


def test_config_says_what_was_merged(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
        SponConfig(init_weights=False, sparsity=0.4, dense_prefix=2, alpha_modules=["down_proj"]),
    )
    adapter = collect_adapter(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    thresholds = stored.pop("thresholds")
    assert stored == {
        "quant_method": "spon", "format_version": 2, "sparsity": 0.4, "tokens": "all", "dense_prefix": 2,
        "adapter_digest": adapter.digest,
    }  # fmt: skip
    assert thresholds.keys() == adapter.masks.keys()
    assert all(torch.equal(torch.tensor([v]), adapter.masks[k].threshold) for k, v in thresholds.items())


def test_biases_are_made_where_the_base_has_none(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert all(layer.bias is not None and layer.bias.any() for layer in sparse_layers(model).values())
    assert len(sparse_layers(model)) == 14 and not isinstance(model.lm_head, SparseLinear)


def test_the_dense_models_biases_are_kept_for_dense_steps(saved, tmp_path):
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    for path, layer in sparse_layers(AutoModelForCausalLM.from_pretrained(saved)).items():
        own = dense.get_submodule(path).bias
        assert layer.spon_dense_bias.shape == layer.bias.shape and (own is not None or not layer.spon_dense_bias.any())
        assert layer.tokens is None
    tensors = load_file(saved / "model.safetensors")
    del tensors[f"{PATH}.spon_dense_bias"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SponError, match=f"{PATH}.spon_dense_bias: got 'no such tensor'"):
        AutoModelForCausalLM.from_pretrained(saved)


@torch.no_grad()
@pytest.mark.parametrize(("prefix", "biases"), [(0, False), (1, True)])
def test_adapters_of_format_1_are_merged_as_they_were(prefix, biases, tmp_path):
    model = merged(format_version=1, dense_prefix=prefix)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["format_version"], stored["dense_prefix"]) == (1, prefix)
    assert any("dense_bias" in key for key in load_file(tmp_path / "model.safetensors")) == biases
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_loaded_model_can_be_cast_and_adapted(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    thresholds = {path: layer.spon_threshold.clone() for path, layer in sparse_layers(model).items()}
    model.to(torch.bfloat16).half().float()
    assert all(torch.equal(sparse_layers(model)[path].spon_threshold, t) for path, t in thresholds.items())
    lora = get_peft_model(model, LoraConfig(target_modules=["down_proj"]))
    lora(input_ids=ids(), labels=ids()).loss.backward()


WRONG = {
    "version": (lambda c: c.update(format_version=3), "format_version: got 3"),
    "no version": (lambda c: c.pop("format_version"), "format_version: got None"),
    "unknown field": (lambda c: c.update(bits=4), "bits"),
    "no thresholds": (lambda c: c.pop("thresholds"), "thresholds: got None"),
    "negative": (lambda c: c["thresholds"].update({PATH: -1.0}), f"{PATH}: got -1.0"),
    "text": (lambda c: c["thresholds"].update({PATH: "0.1"}), f"{PATH}: got '0.1'"),
    "nan": (lambda c: c["thresholds"].update({PATH: float("nan")}), f"{PATH}: got nan"),
    "no such layer": (lambda c: c["thresholds"].update({"model.layers.9.x": 0.1}), "model.layers.9.x"),
    "no linear": (lambda c: c["thresholds"].update({"model.norm": 0.1}), "model.norm.*LlamaRMSNorm"),
    "tokens": (lambda c: c.update(tokens="some"), "tokens: got 'some'"),
    "sparsity": (lambda c: c.update(sparsity=2), "sparsity: got 2"),
    "prefix": (lambda c: c.update(dense_prefix=-1), "dense_prefix: got -1"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_malformed_config_is_refused(wrong, saved):
    change, message = WRONG[wrong]
    edit(saved, change)
    with pytest.raises(SponError, match=message):
        AutoModelForCausalLM.from_pretrained(saved)


def test_registering_again_is_harmless_and_conflicts_are_said(monkeypatch):
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    spon_transformers.register()
    spon_transformers.register()
    assert AUTO_QUANTIZER_MAPPING["spon"] is make_quantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["spon"] is SponQuantizationConfig
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "spon", object)
    with pytest.raises(RuntimeError, match="registered"):
        spon_transformers.register()


def test_new_process_without_peft(saved, tmp_path):
    expected = logits(AutoModelForCausalLM.from_pretrained(saved))
    code = f"""
import sys, torch, transformers, spon_transformers
spon_transformers.register()
model = transformers.AutoModelForCausalLM.from_pretrained({str(saved)!r})
with torch.no_grad():
    torch.save(model(input_ids=torch.tensor({ids().tolist()})).logits, {str(tmp_path / "out.pt")!r})
assert "spon_peft" not in sys.modules
"""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "integrations")])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": paths})
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)
