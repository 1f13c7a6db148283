# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from spon_models import KINDS, ids, layers, logits, sparse, tiny
from torch import nn

from spon_peft import SponConfig, SponLayer, SponLinear, collect_adapter
from spon_plugin import SparseConv1D, SparseLinear, SponError, fold_alpha, sparse_inputs, sparsify


@pytest.mark.parametrize("alpha_modules", ["all", [], ["down_proj", "fc2"]])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_same_as_the_core(kind, prefix, alpha_modules):
    model = sparse(kind, dense_prefix=prefix, alpha_modules=alpha_modules)
    adapter = collect_adapter(model)
    base = tiny(kind)
    dense = logits(base)
    with sparse_inputs(base, adapter.masks, prefix):
        expected = logits(base)
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(expected, dense, atol=1e-2)


def test_decode_runs_the_context_dense():
    tokens = ids(1, 9)
    model, base = sparse(tokens="decode", dense_prefix=0), tiny()
    assert torch.equal(logits(model, tokens), logits(base, tokens))
    with torch.no_grad():
        out = model(input_ids=tokens[:, :6], use_cache=True)
        first = model(input_ids=tokens[:, 6:7], past_key_values=out.past_key_values).logits
    assert not torch.allclose(first, logits(base, tokens)[:, 6:7], atol=1e-2)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_keeps_the_function_and_unmerge_every_bit(kind, prefix):
    model = sparse(kind, dense_prefix=prefix)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    unmerged = logits(model)
    model.merge_adapter(safe_merge=True)
    assert any(layer.get_base_layer().bias is not None for layer in layers(model))
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model), unmerged)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_while_merged_is_the_adapter(kind, tmp_path):
    model = sparse(kind, dense_prefix=0)
    unmerged = logits(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(kind), tmp_path).eval()), unmerged)


def test_a_bias_that_is_a_buffer_comes_back_as_one():
    model = sparse("qwen2", dense_prefix=0)
    base = next(m for m in model.modules() if isinstance(m, SponLayer) and m.get_base_layer().bias is not None)
    host = base.get_base_layer()
    bias = host.bias.data
    del host.bias
    host.register_buffer("bias", bias.clone())
    unmerged = logits(model)
    model.merge_adapter()
    assert not torch.equal(host.bias, bias)
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert "bias" in host._buffers and torch.equal(host.bias, bias) and torch.equal(logits(model), unmerged)


def test_merging_folds_in_float32_and_casts_once():
    model = sparse("qwen2", dtype=torch.bfloat16, dense_prefix=0)
    adapter, base = collect_adapter(model), tiny("qwen2", dtype=torch.bfloat16)
    model.merge_adapter()
    for path, layer in ((p.removeprefix("base_model.model."), m) for p, m in model.named_modules()):
        if isinstance(layer, SponLayer):
            linear = base.get_submodule(path)
            folded = fold_alpha(linear, adapter.masks[path].alpha)
            folded = folded if linear.bias is None else linear.bias.float() + folded
            assert torch.equal(layer.get_base_layer().bias, folded.to(torch.bfloat16))


def test_merging_survives_a_cast_in_between():
    model = sparse("qwen2")
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    for path, module in tiny("qwen2", dtype=torch.bfloat16).named_modules():
        if path.endswith("proj"):
            base = model.base_model.model.get_submodule(path).get_base_layer()
            assert (base.bias is None) == (module.bias is None)
            assert base.bias is None or torch.equal(base.bias, module.bias)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_disabled_and_unloaded_are_the_dense_model_bit_for_bit(kind, merged):
    dense, model = logits(tiny(kind)), sparse(kind)
    enabled = logits(model)
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), dense)
    assert torch.equal(logits(model), enabled)
    if merged:
        model.merge_adapter()
    base = model.unload()
    assert torch.equal(logits(base), dense)
    assert not layers(base) and not base._forward_pre_hooks and not base._forward_hooks
    assert base.state_dict().keys() == tiny(kind).state_dict().keys()


def test_safe_merge_refuses_nan_and_changes_nothing():
    model = sparse("qwen2")
    first = layers(model)[0]
    first.spon_alpha["default"].data[0] = float("nan")
    bias = first.get_base_layer().bias
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert first.get_base_layer().bias is bias and not first.merged


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merge_and_unload_leaves_sparse_layers(kind):
    model = sparse(kind)
    expected = logits(model)
    merged = model.merge_and_unload()
    found = [m for m in merged.modules() if isinstance(m, SparseLinear | SparseConv1D)]
    assert len(found) == (14 if kind == "llama" else 8) and not layers(merged)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_follow_their_own_passes(copier, prefix):
    model = sparse(dense_prefix=prefix)
    expected = logits(model)
    other = copier(model)
    del model
    assert torch.equal(logits(other), expected)
    base = other.unload()
    assert not base._forward_pre_hooks and not base._forward_hooks


def test_copy_of_a_merged_model():
    merged = sparse(dense_prefix=2).merge_and_unload()
    assert torch.equal(logits(copy.deepcopy(merged)), logits(merged))


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16().float()])
def test_thresholds_and_alphas_survive_casts(cast):
    model = sparse()
    before = collect_adapter(model)
    parameters = [layer.spon_alpha["default"] for layer in layers(model)]
    cast(model)
    assert collect_adapter(model).digest == before.digest
    assert all(p is layer.spon_alpha["default"] for p, layer in zip(parameters, layers(model), strict=True))
    assert model.base_model.model.lm_head.weight.dtype != torch.float32 or cast.__code__.co_names[-1] == "float"


def test_adapters_of_a_half_precision_base_are_float32():  # unless asked otherwise: test_autocast
    model = get_peft_model(tiny(dtype=torch.bfloat16), SponConfig(init_weights=False))
    for layer in layers(model):
        assert layer.spon_alpha["default"].dtype == layer.spon_threshold["default"].dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16


def test_bfloat16_adds_in_float32():
    linear = nn.Linear(64, 32).bfloat16()
    layer = get_peft_model(nn.Sequential(linear), SponConfig(target_modules=["0"])).base_model.model[0]
    layer.spon_alpha["default"].data.fill_(1e-2)
    x = torch.randn(50, 64, dtype=torch.bfloat16) / 10
    expected = linear(x).float() + linear.weight.float() @ torch.full((64,), 1e-2)
    assert torch.equal(layer(x), expected.bfloat16())


def test_under_autocast():
    model, tokens = sparse(dense_prefix=0), ids()
    product = layers(model)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=tokens).logits
        loss = out.float().sum()
    loss.backward()
    assert out.dtype == torch.bfloat16
    assert product.spon_alpha["default"].grad.dtype == torch.float32
    assert product.spon_alpha["default"].grad.abs().sum() > 0


def test_adapters_differ_in_what_they_leave_dense():
    model = sparse(dense_prefix=0)
    model.add_adapter("other", SponConfig(init_weights=False, dense_prefix=4, task_type="CAUSAL_LM"))
    adapter, base = collect_adapter(model, "other"), tiny()
    first = logits(model)
    model.set_adapter("other")
    with sparse_inputs(base, adapter.masks, 4):
        assert torch.equal(logits(model), logits(base))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)

    def hooks():
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    assert hooks() == 2 * 2  # one before and one after each block, for `other` alone
    model.delete_adapter("other")
    assert hooks() == 0
    assert torch.equal(logits(model), first)


def test_two_active_adapters_on_different_layers_work():
    model = sparse(layers_to_transform=0)
    only_first = logits(model)
    model.add_adapter("other", SponConfig(init_weights=False, layers_to_transform=1))
    model.base_model.set_adapter(["default", "other"])
    assert not torch.equal(logits(model), only_first)


def test_layers_called_alone_mask_every_row():
    model = sparse()
    logits(model, ids(2, 8))
    layer = layers(model)[0]
    x = torch.randn(16, 16)  # as many rows as the pass before had tokens
    with torch.no_grad():
        base = layer.get_base_layer()
        masked = base(sparsify(x, layer.spon_threshold["default"]))
        expected = masked + fold_alpha(base, layer.spon_alpha["default"])
        assert torch.equal(layer(x), expected)
    layer = layers(sparse(dense_prefix=1))[0]
    with pytest.raises(SponError, match="dense_prefix: .*outside of its decoder block"):
        layer(x)


@pytest.mark.parametrize("shape", [(6, 4), (4,), (2, 3, 4), (6, 1)])
def test_models_that_are_not_of_language_mask_every_row(shape):
    linear = nn.Linear(shape[-1], 3)
    model = get_peft_model(nn.Sequential(linear), SponConfig(target_modules=["0"], init_weights=False))
    layer = layers(model)[0]
    x = torch.randn(shape)
    if len(shape) == 3:
        x = x[0]
    with torch.no_grad():
        expected = linear(sparsify(x, layer.spon_threshold["default"])) + linear.weight @ layer.spon_alpha["default"]
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_left_padding_changes_nothing(kind, prefix):
    model = sparse(kind, dense_prefix=prefix)
    short, long = ids(1, 5, seed=3), ids(1, 8, seed=4)
    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), long])
    mask = (torch.arange(8) >= torch.tensor([[3], [0]])).long()
    settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    together = model.generate(input_ids=batch, attention_mask=mask, **settings)
    for row, alone in ((0, short), (1, long)):
        expected = model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **settings)
        assert torch.equal(together[row, 8:], expected[0, alone.shape[1] :])


def test_status_and_repr():
    model = sparse(alpha_modules=["down_proj"])
    status = model.get_model_status()
    assert status.num_adapter_layers == 14 and status.available_adapters == ["default"] and status.enabled is True
    assert "spon.SponLinear" in repr(model)
    assert isinstance(layers(model)[0], SponLinear)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"base_model.model.model.layers.{i}.mlp.down_proj.spon_alpha.default" for i in (0, 1)}
