# SPDX-License-Identifier: Apache-2.0
"""What PEFT may do to a merged model: add other adapters beside its sparse layers, but not merge them into these."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from spon_models import ids, logits, sparse, tiny

from spon_peft import SponConfig
from spon_plugin import SponError

METHODS = {
    "LoRA": lambda targets: LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False),
    "DoRA": lambda targets: LoraConfig(target_modules=targets, use_dora=True, init_lora_weights=False),
    "IA3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=targets, init_ia3_weights=False),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_update_is_not_merged_behind_a_mask(method):
    model = get_peft_model(sparse().merge_and_unload(), METHODS[method](["q_proj", "down_proj"])).eval()
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(SponError, match="the update would lie behind its mask"):
            merge()
        assert torch.equal(logits(model), before)  # nothing has changed


def test_an_update_of_a_dense_layer_is_merged():
    base = sparse(target_modules=["down_proj"]).merge_and_unload()
    model = get_peft_model(base, METHODS["LoRA"](["q_proj"])).eval()
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-4, atol=1e-4)


def test_the_dense_model_still_merges():
    model = get_peft_model(tiny(), METHODS["LoRA"](["q_proj"])).eval()
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["down_proj"], ["q_proj"]], ids=["the same linears", "others"])
def test_a_second_adapter_of_ours_starts_from_the_base_model(targets):
    merged = sparse(target_modules=["down_proj"]).merge_and_unload()
    with pytest.raises(SponError, match="Start from the base model, not from a merged one"):
        get_peft_model(merged, SponConfig(target_modules=targets))
    assert logits(merged, ids()).isfinite().all()
