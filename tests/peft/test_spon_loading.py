# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from spon_models import LLAMA, ids, logits, sparse, tiny
from transformers import LlamaConfig, LlamaForCausalLM

from spon_peft import SponConfig, SponLayer, collect_adapter
from spon_plugin import SponError
from spon_plugin.adapter.base import base_digest

DOWN = "base_model.model.model.layers.0.mlp.down_proj"


@pytest.fixture
def adapter(tmp_path):
    model = sparse(dense_prefix=2, alpha_modules=["down_proj", "q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_tensors(path, change):
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def edit_config(path, change):
    config = json.loads((path / "adapter_config.json").read_text())
    change(config)
    (path / "adapter_config.json").write_text(json.dumps(config))


def truncate(path):
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def tensors(change):
    return lambda path: edit_tensors(path, change)


def config(**values):
    return lambda path: edit_config(path, lambda c: c.update(values))


WRONG = {
    "version": (config(format_version=3), "format_version: got 3"),
    "sparsity": (config(sparsity=1.5), "sparsity: got 1.5"),
    "truncated": (truncate, "truncated or damaged"),
    "nan": (tensors(lambda t: t[f"{DOWN}.spon_alpha"].fill_(float("nan"))), r"down_proj.spon_alpha: got 'NaN"),
    "negative": (tensors(lambda t: t[f"{DOWN}.spon_threshold"].fill_(-1)), r"down_proj.spon_threshold: got -1"),
    "dtype": (tensors(lambda t: t.update({f"{DOWN}.spon_alpha": t[f"{DOWN}.spon_alpha"].half()})), "torch.float16"),
    "shape": (tensors(lambda t: t.update({f"{DOWN}.spon_threshold": torch.zeros(2)})), r"got \(2,\)"),
    "missing": (tensors(lambda t: t.pop(f"{DOWN}.spon_alpha")), "down_proj.spon_alpha: got 'no such tensor'"),
    "extra": (tensors(lambda t: t.update({f"{DOWN}.lora_A.weight": torch.zeros(2)})), "lora_A"),
    "without threshold": (tensors(lambda t: t.pop(f"{DOWN}.spon_threshold")), "alpha without a threshold"),
}


def from_pretrained(model, path):
    PeftModel.from_pretrained(model, path)


def load_adapter(model, path):
    model.load_adapter(str(path))


def auto(model, path):
    model.save_pretrained(path / "base")
    edit_config(path, lambda c: c.update(base_model_name_or_path=str(path / "base")))
    AutoPeftModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("load", [from_pretrained, load_adapter, auto])
@pytest.mark.parametrize("wrong", WRONG)
def test_broken_adapter_is_refused_before_the_model_is_touched(wrong, load, adapter):
    breaking, message = WRONG[wrong]
    breaking(adapter)
    model = tiny()
    before = logits(model)
    with pytest.raises(SponError, match=message):
        load(model, adapter)
    assert not any(isinstance(m, SponLayer) for m in model.modules())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("load", [from_pretrained, load_adapter])
def test_wrong_base_is_named(load, adapter):
    edit_config(adapter, lambda c: c.update(base_model_name_or_path="the/right-one"))
    wider = LlamaForCausalLM(LlamaConfig(**LLAMA | {"hidden_size": 32}))
    with pytest.raises(SponError, match=r"spon_alpha: got \(16,\), expected shape \(32,\).*'the/right-one'"):
        load(wider, adapter)
    shallower = LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_hidden_layers": 1}))
    with pytest.raises(SponError, match=r"7 sparsified layers such as model.layers.1.*'the/right-one'"):
        load(shallower, adapter)
    deeper = LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_hidden_layers": 3}))
    with pytest.raises(SponError, match=r"7 layers such as model.layers.2.*'the/right-one'"):
        load(deeper, adapter)


def test_adding_a_broken_adapter_leaves_the_others_alone(adapter):
    model = sparse(seed=5)
    before = logits(model)
    edit_tensors(adapter, lambda t: t[f"{DOWN}.spon_threshold"].fill_(-1))
    with pytest.raises(SponError, match="down_proj.spon_threshold"):
        model.load_adapter(adapter, "other")
    assert torch.equal(logits(model), before) and list(model.peft_config) == ["default"]


@pytest.mark.parametrize("wrong", ["nan", "negative", "dtype", "missing"])
def test_tensors_from_elsewhere_are_checked_too(wrong, adapter):
    model = sparse(dense_prefix=2, alpha_modules=["down_proj", "q_proj"], seed=7)
    before = collect_adapter(model).digest
    breaking, message = WRONG[wrong]
    breaking(adapter)
    with pytest.raises(SponError, match=message):
        set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    assert collect_adapter(model).digest == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_every_way_of_loading_gives_the_same_function(dtype, low_cpu_mem_usage, adapter):
    model = sparse(dtype=dtype, dense_prefix=2, alpha_modules=["down_proj", "q_proj"])
    expected, digest = logits(model), collect_adapter(model).digest
    loaded = PeftModel.from_pretrained(tiny(dtype=dtype), adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    injected = tiny(dtype=dtype)
    injected.load_adapter(str(adapter))
    second = sparse(dtype=dtype, seed=9)
    second.load_adapter(adapter, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    second.set_adapter("second")
    for each, name in ((loaded, "default"), (injected, "default"), (second, "second")):
        assert torch.equal(logits(each), expected)
        assert collect_adapter(each, name).digest == digest


def test_auto_class(adapter):
    tiny().save_pretrained(adapter / "base")
    edit_config(adapter, lambda c: c.update(base_model_name_or_path=str(adapter / "base")))
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert torch.equal(logits(model), logits(sparse(dense_prefix=2, alpha_modules=["down_proj", "q_proj"])))


def test_named_adapters_go_to_folders(tmp_path):
    model = sparse()
    model.add_adapter("other", model.peft_config["default"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "other", adapter_name="x")
    model.set_adapter("other")
    assert torch.equal(logits(loaded), logits(model))


def test_injected_layers_can_be_switched_and_deleted(adapter):
    model = tiny()
    dense = logits(model)
    model.load_adapter(str(adapter))
    sparse_logits = logits(model)
    model.disable_adapters()
    assert torch.equal(logits(model), dense)
    model.enable_adapters()
    assert torch.equal(logits(model), sparse_logits)
    model.delete_adapter("default")
    assert torch.equal(logits(model), dense)
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_state_dict_round_trip():
    model, other = sparse(), sparse(seed=3)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(logits(other), logits(model))


def test_modules_to_save(tmp_path):
    model = sparse(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path)), expected)


def test_new_process_gives_the_same_bits(adapter, tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    torch.save(ids(), tmp_path / "ids.pt")
    code = f"""
import torch, transformers, peft
import spon_peft
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = peft.PeftModel.from_pretrained(model, {str(adapter)!r})
with torch.no_grad():
    torch.save(model(input_ids=torch.load({str(tmp_path / "ids.pt")!r})).logits, {str(tmp_path / "out.pt")!r})
"""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "integrations")])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": paths})
    expected = logits(sparse(dense_prefix=2, alpha_modules=["down_proj", "q_proj"]))
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


def test_other_weights_of_the_same_shape_are_pointed_out(tmp_path, recwarn):
    made = get_peft_model(tiny(), SponConfig(base_digest=base_digest(tiny())))
    made.save_pretrained(tmp_path / "adapter")
    for same in (tiny(), tiny(dtype=torch.bfloat16), tiny(dtype=torch.float16)):  # which keeps fewer bits: nobody knows
        PeftModel.from_pretrained(same, tmp_path / "adapter")
    assert not [w for w in recwarn if "other weights" in str(w.message)]
    with pytest.warns(UserWarning, match=f"made for other weights.*{base_digest(tiny())[:12]}.*LlamaForCausalLM has"):
        PeftModel.from_pretrained(tiny(seed=1), tmp_path / "adapter")
