# SPDX-License-Identifier: Apache-2.0
"""Linears with a forward of their own have one answer in PEFT, merging, the quantizer and the core's hooks."""

import pytest
import torch
from peft import get_peft_model
from spon_models import ids, logits, tiny
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from spon_peft import SponConfig, collect_adapter
from spon_plugin import SponError, find_sites
from spon_plugin.weights import Opaque, weight_of
from spon_plugin.weights.dense import DenseWeight

FALCON = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2)


class Scaled(nn.Linear):
    """Affine, but not by the weight that it holds."""

    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight, self.bias)


class Spelled(nn.Linear):
    """What `torch.nn.Linear` computes, by another way."""

    def forward(self, x):
        y = torch.einsum("...i,oi->...o", x, self.weight)
        return y if self.bias is None else y + self.bias


def falcon(bias=False):
    torch.manual_seed(0)
    config = FalconConfig(**FALCON, new_decoder_architecture=True, initializer_range=0.2, bias=bias)
    return FalconForCausalLM(config).eval()


def with_layer(cls):
    model = tiny()
    old = model.model.layers[0].mlp.down_proj
    new = cls(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    model.model.layers[0].mlp.down_proj = new
    return model


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_falcon_is_sparsified_merged_saved_and_loaded(bias, tmp_path):
    assert sum(len(site.modules) for site in find_sites(falcon(bias))) == 8
    torch.manual_seed(1)
    model = get_peft_model(falcon(bias), SponConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
    expected = logits(model)
    assert not torch.allclose(expected, logits(falcon(bias)), atol=1e-2)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(merged))


@pytest.mark.parametrize("cls, kind", [(Spelled, DenseWeight), (Scaled, Opaque)])
def test_what_a_layer_multiplies_is_found_by_asking_it(cls, kind):
    layer = cls(12, 8)
    handle = layer.register_forward_pre_hook(lambda _module, args: (torch.zeros_like(args[0]),))  # a mask, say
    assert isinstance(weight_of(layer), kind)
    handle.remove()
    assert isinstance(weight_of(cls(12, 8, dtype=torch.bfloat16)), kind)


def test_a_layer_that_multiplies_another_weight_is_right_unmerged_and_not_merged():
    torch.manual_seed(1)
    model = get_peft_model(with_layer(Scaled), SponConfig(target_modules=["down_proj"], init_weights=False)).eval()
    mask = collect_adapter(model).masks["model.layers.0.mlp.down_proj"]
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 24)
    kept = x * (x.abs() > mask.threshold)
    expected = (kept + mask.alpha) @ (2 * layer.get_base_layer().weight.t())
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    before = logits(model, ids())
    with pytest.raises(SponError, match=r"layers\.0\.mlp\.down_proj: got 'Scaled has a forward of its own'"):
        model.merge_and_unload()
    assert torch.equal(logits(model, ids()), before)
