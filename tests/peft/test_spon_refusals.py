# SPDX-License-Identifier: Apache-2.0
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from spon_models import ids, layers, sparse, tiny
from torch import nn

from spon_peft import SponConfig
from spon_plugin import SponError


def test_merge_and_unload_of_an_unknown_linear_is_refused_before_any_change():
    class Odd(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    base = nn.Sequential(nn.Linear(4, 4), Odd(4, 4))
    model = get_peft_model(base, SponConfig(target_modules=["0", "1"], init_weights=False))
    x = torch.randn(3, 4)
    before = model(x)
    with pytest.raises(SponError, match=r"merge_and_unload: 1.*Odd"):
        model.merge_and_unload()
    assert torch.equal(model(x), before) and len(layers(model)) == 2


def test_two_active_adapters_are_refused_before_any_change():
    model = sparse(layers_to_transform=1)
    model.add_adapter("other", SponConfig(init_weights=False))
    with pytest.raises(SponError, match=r"default.*other"):
        model.base_model.set_adapter(["default", "other"])
    assert all(layer.active_adapters == ["default"] for layer in layers(model))
    with pytest.raises(SponError, match="one SPON adapter"):
        model.base_model.merge_adapter(adapter_names=["default", "other"])
    assert not any(layer.merged for layer in layers(model))
    with pytest.raises(SponError, match="one SPON adapter"):
        model.base_model.merge_and_unload(adapter_names=["default", "other"])


def test_merging_a_second_adapter_is_refused():
    model = sparse()
    model.add_adapter("other", SponConfig(init_weights=False))
    model.merge_adapter()
    with pytest.raises(SponError, match="one SPON adapter"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(adapter_names=["other"])


def test_mixed_batches_are_refused():
    model = sparse()
    with pytest.raises(SponError, match="adapter_names"):
        model(input_ids=ids(), adapter_names=["default", "default"])
    with pytest.raises(SponError, match="adapter_names"):
        layers(model)[0](torch.randn(2, 16), adapter_names=["default", "default"])


@pytest.mark.parametrize(
    ("target", "kind"),
    [("embed_tokens", "Embedding"), ("input_layernorm", "LlamaRMSNorm"), ("self_attn", "LlamaAttention")],
)
def test_other_modules_are_refused_by_name(target, kind):
    with pytest.raises(SponError, match=rf"{target}.*{kind}"):
        get_peft_model(tiny(), SponConfig(target_modules=[target]))


def test_linear_of_multihead_attention_is_refused():
    with pytest.raises(SponError, match="out_proj"):
        get_peft_model(nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)}), SponConfig(target_modules=["out_proj"]))


def test_layers_of_other_methods_are_refused():
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.raises(SponError, match=r"q_proj.*Merge or unload"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, SponConfig(target_modules=["q_proj"]))


def test_sparse_layers_are_refused():
    with pytest.raises(SponError, match="base model"):
        get_peft_model(sparse().merge_and_unload(), SponConfig())
