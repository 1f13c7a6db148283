# SPDX-License-Identifier: Apache-2.0
"""Thresholds per channel and centres through everything that PEFT does with an adapter."""

import copy
import json
import pickle

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
from spon_models import KINDS, ids, layers, logits, sparse, tiny

from spon_peft import SponConfig, collect_adapter
from spon_plugin import SparseConv1D, SparseLinear, SponError, fold_alpha, read_adapter, sparse_inputs

VECTORS = {
    "channel": dict(channel_modules="all"),
    "centre": dict(center_modules="all"),
    "both": dict(channel_modules="all", center_modules="all"),
    "some": dict(channel_modules=["q_proj", "fc1", "c_fc"], center_modules=["down_proj", "fc2", "c_proj"]),
}
SOME = dict(dense_prefix=2, alpha_modules=["down_proj", "q_proj"], **VECTORS["some"])

every_kind = pytest.mark.parametrize("vectors", VECTORS)


@pytest.fixture
def adapter(tmp_path):
    sparse(**SOME).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@every_kind
@pytest.mark.parametrize("alpha_modules", ["all", []], ids=["alpha", "no-alpha"])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_same_as_the_core(dtype, kind, prefix, alpha_modules, vectors):
    model = sparse(kind, dtype, dense_prefix=prefix, alpha_modules=alpha_modules, **VECTORS[vectors])
    adapter = collect_adapter(model)
    assert bool(adapter.channel_modules) == (vectors != "centre") and bool(adapter.center_modules) == (
        vectors != "channel"
    )
    base = tiny(kind, dtype=dtype)
    dense = logits(base)
    with sparse_inputs(base, adapter.masks, prefix):
        expected = logits(base)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, dense, atol=1e-2)


@every_kind
@pytest.mark.parametrize("alpha_modules", ["all", []], ids=["alpha", "no-alpha"])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_keeps_the_function_and_unmerge_every_bit(kind, prefix, alpha_modules, vectors):
    model = sparse(kind, dense_prefix=prefix, alpha_modules=alpha_modules, **VECTORS[vectors])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    unmerged = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model), unmerged)


@every_kind
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_disabled_and_unloaded_are_the_dense_model_bit_for_bit(kind, merged, vectors):
    dense, model = logits(tiny(kind)), sparse(kind, **VECTORS[vectors])
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), dense)
    if merged:
        model.merge_adapter()
    assert torch.equal(logits(model.unload()), dense)


def test_merging_folds_in_float32_and_casts_once():
    model = sparse("qwen2", dtype=torch.bfloat16, dense_prefix=0, center_modules="all")
    adapter, base = collect_adapter(model), tiny("qwen2", dtype=torch.bfloat16)
    model.merge_adapter()
    for path, mask in adapter.masks.items():
        linear, merged = base.get_submodule(path), model.base_model.model.get_submodule(path).get_base_layer()
        folded = fold_alpha(linear, mask.center + mask.alpha)
        folded = folded if linear.bias is None else linear.bias.float() + folded
        assert torch.equal(merged.bias, folded.to(torch.bfloat16))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merge_and_unload_leaves_sparse_layers(kind, prefix, dtype, vectors):
    model = sparse(kind, dtype, dense_prefix=prefix, **VECTORS[vectors])
    expected, adapter = logits(model), collect_adapter(model)
    merged = model.merge_and_unload()
    found = {path: m for path, m in merged.named_modules() if isinstance(m, SparseLinear | SparseConv1D)}
    assert found.keys() == adapter.masks.keys() and not layers(merged)
    for path, layer in found.items():
        assert torch.equal(layer.spon_threshold, adapter.masks[path].threshold)
        assert (layer.spon_center is not None) == (adapter.masks[path].center is not None)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16().float()])
def test_vectors_survive_casts(cast):
    model = sparse(**VECTORS["both"])
    before = collect_adapter(model).digest
    cast(model)
    assert collect_adapter(model).digest == before


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_compute_the_same(copier):
    model = sparse(**SOME)
    assert torch.equal(logits(copier(model)), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["in-memory", "meta"])
def test_every_way_of_loading_gives_the_same_function(dtype, low_cpu_mem_usage, adapter):
    model = sparse(dtype=dtype, **SOME)
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
    second.delete_adapter("second")
    assert not any("second" in name for name in second.state_dict())


def test_auto_class(adapter):
    tiny().save_pretrained(adapter / "base")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(adapter / "base")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(adapter)), logits(sparse(**SOME)))


def test_config_and_tensors_are_enough(adapter):
    """As for an adapter on a hub, which is no directory to look into."""
    model = tiny()
    config = SponConfig(init_weights=False, task_type="CAUSAL_LM", **SOME)
    tensors = load_file(adapter / "adapter_model.safetensors")
    model.load_adapter(peft_config=config, adapter_state_dict=tensors)
    assert torch.equal(logits(model), logits(sparse(**SOME)))


def test_state_dict_round_trip():
    model, other = sparse(**SOME), sparse(seed=3, **SOME)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(logits(other), logits(model))


def test_what_peft_saves_the_core_reads_and_the_other_way_round(adapter, tmp_path):
    read, held = read_adapter(adapter), collect_adapter(sparse(**SOME))
    assert read.digest == held.digest
    assert read.channel_modules == ["q_proj"] and read.center_modules == ["down_proj"]
    from spon_plugin import write_adapter

    write_adapter(held, tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path / "again")), logits(sparse(**SOME)))


DOWN = "base_model.model.model.layers.0.mlp.down_proj"
WRONG = {
    "missing centre": (lambda t: t.pop(f"{DOWN}.spon_center"), "down_proj.spon_center: got 'no centre', expected one"),
    "scalar": (
        lambda t: t.update({f"{DOWN.replace('mlp.down', 'self_attn.q')}.spon_threshold": torch.ones(1)}),
        "q_proj.spon_threshold: got 'no threshold per channel'",
    ),
    "extra centre": (
        lambda t: t.update({f"{DOWN.replace('down', 'up')}.spon_center": torch.ones(16)}),
        "up_proj.spon_center: got 'a centre', expected none",
    ),
    "dtype": (lambda t: t.update({f"{DOWN}.spon_center": torch.ones(24).half()}), "torch.float16"),
    "length": (lambda t: t.update({f"{DOWN}.spon_center": torch.ones(9)}), r"down_proj.spon_center: got \(9,\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_broken_vectors_are_refused(wrong, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change, message = WRONG[wrong]
    change(tensors)
    model = sparse(**SOME)
    with pytest.raises(SponError, match=message):
        set_peft_model_state_dict(model, tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SponError, match=message):
        PeftModel.from_pretrained(tiny(), adapter)


@pytest.mark.parametrize("field", ["channel_modules", "center_modules"])
def test_a_wrong_field_is_named(field):
    with pytest.raises(SponError, match=f"{field}: got 'down_proj', expected \"all\" or a list"):
        SponConfig(**{field: "down_proj"})
    assert getattr(SponConfig(**{field: {"b", "a"}}), field) == ["a", "b"]


def test_a_new_adapter_is_the_dense_model():
    model = get_peft_model(tiny(), SponConfig(channel_modules="all", center_modules="all"))
    torch.testing.assert_close(logits(model), logits(tiny()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_training_moves_alpha_alone_and_its_gradient_is_that_of_the_formula(dtype):
    model = sparse(dtype=dtype, **VECTORS["both"]).train()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".spon_alpha." in name for name in trainable)
    layer = layers(model)[0]
    x = torch.randn(3, 5, layer.in_features).to(dtype)
    weight = torch.randn(layer.out_features)
    (layer(x) * weight).float().sum().backward()
    # d sum(w . (W alpha)) / d alpha = 15 W^T w
    expected = 15 * layer.get_base_layer().weight.float().t() @ weight
    near = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(
        layer.spon_alpha["default"].grad, expected, rtol=near, atol=near * float(expected.abs().max())
    )
    model.zero_grad()
    before = collect_adapter(model)
    model(input_ids=ids(), labels=ids()).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    after = collect_adapter(model)
    for path, mask in before.masks.items():
        assert not torch.equal(after.masks[path].alpha, mask.alpha)
        assert torch.equal(after.masks[path].threshold, mask.threshold)
        assert torch.equal(after.masks[path].center, mask.center)
