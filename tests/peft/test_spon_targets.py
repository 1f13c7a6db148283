# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from spon_models import layers, sparse, tiny
from torch import nn

from spon_peft import SponConfig
from spon_peft.targets import default_targets
from spon_plugin import SponError

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
T5 = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
DEBERTA = dict(SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"])
LLAMAS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
BERTS = ["intermediate.dense", "key", "output.dense", "query", "value"]
DEFAULTS = {
    "llama": (lambda: tiny("llama"), LLAMAS, 14),
    "opt": (lambda: tiny("opt"), ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"], 12),
    "gpt2": (lambda: tiny("gpt2"), ["c_attn", "c_fc", "c_proj"], 8),
    "mixtral": (lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=2)),
                ["k_proj", "o_proj", "q_proj", "v_proj"], 8),
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**SMALL)), BERTS, 12),
    "t5": (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
           ["k", "o", "q", "v", "wi", "wo"], 32),
    "deberta": (lambda: transformers.DebertaModel(transformers.DebertaConfig(**DEBERTA)), ["dense"], 6),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEFAULTS)
def test_targets_by_default_are_those_of_the_sites(kind, tmp_path):
    make, names, count = DEFAULTS[kind]
    model = get_peft_model(make(), SponConfig())
    assert len(model.targeted_module_names) == count
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(stored["target_modules"]) == names


@pytest.mark.parametrize("first", [SponConfig, lambda: LoraConfig(target_modules=["q_proj"])], ids=["SPON", "LoRA"])
def test_targets_by_default_do_not_see_other_adapters(first):
    model = inject_adapter_in_model(first(), tiny())
    assert default_targets(model) == set(LLAMAS)


def test_a_second_adapter_has_the_same_targets_by_default():
    model = sparse()
    model.add_adapter("second", SponConfig(init_weights=False))
    assert model.peft_config["second"].target_modules == set(LLAMAS)
    assert all({"default", "second"} == set(layer.spon_threshold) for layer in layers(model))


def test_targets_by_default_without_running_the_model():
    with torch.device("meta"):
        model = tiny()
    model.forward = None
    assert len(get_peft_model(model, SponConfig()).targeted_module_names) == 14


def test_an_architecture_that_nobody_has_heard_of_has_targets(monkeypatch):
    model = tiny()
    monkeypatch.setattr(type(model.config), "model_type", "unheard_of")
    assert len(get_peft_model(model, SponConfig()).targeted_module_names) == 14


def test_a_model_without_blocks_says_what_to_do():
    with pytest.raises(
        SponError, match=r"target_modules: got None.*Sequential has no blocks.*specify `target_modules`"
    ):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), SponConfig())
