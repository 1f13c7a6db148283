# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import fields

import pytest
import torch
from masks import alphas_of
from peft import PeftConfig, PeftModel, get_peft_model
from spon_models import ids, logits, sparse, tiny

from spon_peft import SponConfig, collect_adapter
from spon_plugin import Adapter, SponError, SponFields, read_adapter, write_adapter
from spon_plugin.adapter.directory import read_config


def test_defaults_are_those_of_the_core():
    config, core = SponConfig(), SponFields()
    for field in fields(SponFields):
        assert getattr(config, field.name) == getattr(core, field.name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparsity": 1.0},
        {"sparsity": "half"},
        {"allocation": "random"},
        {"tokens": "prompt"},
        {"dense_prefix": -1},
        {"dense_prefix": True},
        {"alpha_modules": "down_proj"},
        {"calibration": []},
        {"format_version": 3},
    ],
)
def test_wrong_field_is_named(wrong):
    (name,) = wrong
    with pytest.raises(SponError, match=name):
        SponConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"layers_to_transform": 0}, {"layers_pattern": "layers"}])
def test_layers_cannot_be_chosen_beside_a_regular_expression(wrong):
    with pytest.raises(SponError, match=next(iter(wrong))):
        SponConfig(target_modules=".*proj", **wrong)


def test_layers_pattern_needs_layers():
    with pytest.raises(SponError, match="layers_pattern"):
        SponConfig(layers_pattern="layers")


def test_layer_zero_can_be_chosen():
    model = get_peft_model(tiny(), SponConfig(layers_to_transform=0))
    assert model.targeted_module_names
    assert all(name.startswith("model.layers.0.") for name in model.targeted_module_names)


def test_exclude_modules():
    model = get_peft_model(tiny(), SponConfig(exclude_modules=["down_proj"]))
    assert "down_proj" not in {name.rpartition(".")[2] for name in model.targeted_module_names}
    assert len(model.targeted_module_names) == 12


def test_all_linear_leaves_the_head_out():
    model = get_peft_model(tiny(), SponConfig(target_modules="all-linear"))
    assert len(model.targeted_module_names) == 14


def test_config_survives_peft_and_core(tmp_path):
    config = SponConfig(
        sparsity=0.4, allocation="greedy", tokens="decode", dense_prefix=3, alpha_modules=("up_proj", "down_proj"),
        calibration={"dataset": "text", "achieved": {"a.b": 0.41}}, target_modules=["up_proj", "down_proj"],
        layers_to_transform=0,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(read, SponConfig) and read == config
    own, peft = read_config(tmp_path)
    assert own == SponFields(0.4, "greedy", "decode", 3, ["down_proj", "up_proj"], config.calibration)
    assert set(peft["target_modules"]) == {"up_proj", "down_proj"} and peft["layers_to_transform"] == 0


@pytest.mark.parametrize(("version", "prefix"), [(1, 1), (2, 0)])
def test_the_format_version_says_what_is_dense(version, prefix, tmp_path):
    SponConfig(format_version=version).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config.pop("dense_prefix") == prefix and "alpha_scale" not in config
    file.write_text(json.dumps(config))
    read = PeftConfig.from_pretrained(tmp_path)
    assert (read.format_version, read.dense_prefix) == (version, prefix)
    assert SponConfig().format_version == 2 and SponConfig().dense_prefix == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [None, "half", "bfloat16"])
def test_peft_writes_what_the_core_reads(dtype, cast, tmp_path):
    model = sparse(dtype=dtype, alpha_modules=["down_proj"], dense_prefix=2)
    before = collect_adapter(model)
    if cast:
        getattr(model, cast)()
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.digest == before.digest
    assert len(adapter.masks) == 14
    assert alphas_of(adapter).keys() == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert adapter.fields.dense_prefix == 2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_reads_what_the_core_writes(kind, tmp_path):
    model = sparse(kind, dense_prefix=1)
    expected = logits(model)
    held = collect_adapter(model)
    # With no more of PEFT's fields than calibration knows.
    plain = {"base_model_name_or_path": "tiny", "target_modules": sorted(held.masks)}
    write_adapter(Adapter(held.fields, held.masks, plain), tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny(kind), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)


def test_calibration_can_be_any_json(tmp_path):
    SponConfig(calibration={"sites": [1, {"deep": None}]}).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["calibration"] == {"sites": [1, {"deep": None}]}
    assert stored["peft_type"] == "SPON"


def test_no_op_by_default():
    model = tiny()
    dense = logits(model)
    assert torch.equal(logits(get_peft_model(model, SponConfig())), dense)
    assert ids().shape == dense.shape[:2]
