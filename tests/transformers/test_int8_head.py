# SPDX-License-Identifier: Apache-2.0
"""The output head of a merged model in int8."""

import json

import pytest
import torch
from commands import run
from peft import get_peft_model
from safetensors.torch import load_file
from tiny_models import make_byte_tokenizer, make_tiny_llama
from transformers import AutoModel, AutoModelForCausalLM

from spon_peft import SponConfig
from spon_plugin import SponError
from spon_plugin.weights.int8 import round_to_int8
from spon_transformers.head import Int8Head, ask_for_head
from spon_transformers.quantize import Rounding, quantize, save_quantized

IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(params=[True, False], ids=["tied", "head of its own"])
def merged(request):
    torch.manual_seed(1)
    base = make_tiny_llama(tie_word_embeddings=request.param)
    return get_peft_model(base, SponConfig(init_weights=False)).merge_and_unload().eval()


def load(path, auto=AutoModelForCausalLM, **kwargs):
    return auto.from_pretrained(path, dtype=torch.float32, **kwargs).eval()


@torch.no_grad()
def hidden_and_logits(model):
    out = model(input_ids=IDS, output_hidden_states=True)
    return out.hidden_states[-1], out.logits


def test_the_rounded_head_is_the_nearest_and_the_embeddings_stay(merged, tmp_path):
    weight = merged.lm_head.weight.detach().clone()
    ask_for_head(merged, "int8")
    assert type(merged.lm_head) is torch.nn.Linear, "it is rounded where it is loaded"
    merged.save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    head = loaded.lm_head
    assert isinstance(head, Int8Head) and head.codes.dtype == torch.int8
    assert torch.equal(loaded.model.embed_tokens.weight, merged.model.embed_tokens.weight)
    step = weight.abs().amax(1) / 127
    assert bool(((head.row_weight.dense().t() - weight).abs() <= step[:, None] * 0.501).all())
    hidden, logits = hidden_and_logits(loaded)
    expected = hidden.double() @ head.row_weight.dense(torch.float64)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(head(hidden[0, :1]).double(), expected[0, :1], rtol=1e-4, atol=1e-5)


def test_files_hold_the_head_as_it_was(merged, tmp_path):
    ask_for_head(merged, "int8")
    merged.save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    loaded.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again"))
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in before) == (not merged.config.tie_word_embeddings)
    again = load(tmp_path / "again")
    assert torch.equal(again.lm_head.codes, loaded.lm_head.codes), "rounding what is rounded changes no code"
    backbone = load(tmp_path / "merged", AutoModel)
    with torch.no_grad():
        assert torch.equal(backbone(input_ids=IDS).last_hidden_state, hidden_and_logits(loaded)[0])


def test_casting_the_model_keeps_codes_and_scales(merged, tmp_path):
    ask_for_head(merged, "int8")
    merged.save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    scales = loaded.lm_head.scales.clone()
    half = loaded.to(torch.bfloat16)
    assert half.lm_head.scales.dtype == torch.float32 and torch.equal(half.lm_head.scales, scales)
    assert half(input_ids=IDS).logits.dtype == torch.bfloat16


def test_outputs_without_weights_are_zero():
    weight = torch.randn(5, 8)
    weight[2] = 0
    assert torch.equal(round_to_int8(weight).dense()[:, 2], torch.zeros(8))


def test_other_heads_are_refused(merged, tmp_path):
    with pytest.raises(SponError, match="head: got 'int3', expected one of int8"):
        ask_for_head(merged, "int3")
    merged.save_pretrained(tmp_path / "merged")
    file = tmp_path / "merged" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["head"] = "int3"
    file.write_text(json.dumps(config))
    with pytest.raises(SponError, match=r"quantization_config: head: got 'int3'"):
        load(tmp_path / "merged")
    merged.lm_head = torch.nn.Sequential(torch.nn.Linear(48, 256))
    with pytest.raises(SponError, match="Leave --head out"):
        ask_for_head(merged, "int8")


@pytest.mark.parametrize("rounded", [True, False], ids=["quantized base", "dense base"])
def test_the_command_rounds_the_head_of_a_quantized_base(tmp_path, rounded):
    pytest.importorskip("compressed_tensors", reason="pip install 'spon-plugin[quantize]'")
    model = make_tiny_llama()
    if rounded:
        quantize(model, Rounding(8, None))
        save_quantized(model, tmp_path / "base")
    else:
        model.save_pretrained(tmp_path / "base")
    make_byte_tokenizer().save_pretrained(tmp_path / "base")
    get_peft_model(load(tmp_path / "base"), SponConfig()).save_pretrained(tmp_path / "adapter")
    common = ("merge", tmp_path / "adapter", "--model", tmp_path / "base")
    asked = {"default": (), "int8": ("--head", "int8"), "none": ("--head", "none")}
    for name, options in asked.items():
        code, _, err = run(*common, "-o", tmp_path / name, *options)
        assert code == 0, err
        rounds = name == "int8" or (name == "default" and rounded)
        assert ("output head in int8: 0.0 MB, instead of 0.0 MB" in err) == rounds
    stored = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in asked}
    heads = {name: config["quantization_config"].get("head") for name, config in stored.items()}
    assert heads == {"default": "int8" if rounded else None, "int8": "int8", "none": None}
    assert isinstance(load(tmp_path / "int8").lm_head, Int8Head)
