# SPDX-License-Identifier: Apache-2.0
"""Masks stay off what they cannot reach and must not touch, and it is said."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

from spon_peft import SponConfig, SponLayer
from spon_plugin import SponError, find_sites
from spon_plugin.decoder.left_dense import left_dense, read_by_parents, text_decoder

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def causal(kind, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **changes})).eval()


def llava():
    """A multimodal model whose image tower holds more weights than its decoder."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=28, patch_size=14
    )
    return Llava(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SMALL), image_token_index=63)).eval()


def names(sites):
    return {path.rpartition(".")[2] for site in sites for path in site.modules}


def test_mamba_multiplies_some_of_its_weights_itself():
    model = causal("mamba")
    read = read_by_parents(model)
    assert {path.rpartition(".")[2] for path in read} == {"x_proj", "dt_proj", "out_proj"}
    assert set(read.values()) == {"MambaMixer"} and names(find_sites(model)) == {"in_proj"}
    assert list(left_dense(model)) == ["multiplied by MambaMixer itself"]
    for target in ("dt_proj", "out_proj"):
        with pytest.raises(SponError, match="MambaMixer multiplies the weight of this one itself"):
            find_sites(model, [target])
        with pytest.raises(SponError, match=rf"{target}: got 'Linear', expected a linear that is called: MambaMixer"):
            get_peft_model(causal("mamba"), SponConfig(target_modules=[target]))


def test_attention_of_torch_multiplies_its_output_itself():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "linear": nn.Linear(16, 16)})
    assert read_by_parents(model) == {"attention.out_proj": "MultiheadAttention"}
    with pytest.raises(SponError, match="expected a linear that is called: MultiheadAttention multiplies its weight"):
        get_peft_model(model, SponConfig(target_modules=["out_proj"]))


class Reader(nn.Module):
    """Uses weights in several ways, of which some are no product."""

    def __init__(self, exact=False):
        super().__init__()
        self.called, self.asked, self.read, self.rare = (nn.Linear(4, 4) for _ in range(4))
        self.exact = exact
        nn.init.ones_(self.called.weight)

    def forward(self, x):
        x = self.asked(x.to(self.asked.weight.dtype)) if isinstance(self.asked.weight, torch.Tensor) else x
        if self.exact and x is not None:
            return x
        if self.exact:
            x = x @ self.rare.weight
        return self.called(nn.functional.linear(x, self.read.weight))


@pytest.mark.parametrize("exact, found", [(False, {"read"}), (True, {"read", "rare"})])
def test_only_values_that_are_used_count(exact, found):
    assert set(read_by_parents(Reader(exact))) == found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "falcon", "bloom", "phi", "gpt_neox", "gemma2", "qwen2"])
def test_ordinary_decoders_have_nothing_of_the_kind(kind):
    assert left_dense(causal(kind)) == {}


def test_an_image_tower_is_left_alone():
    model = llava()
    assert text_decoder(model)[0] == "model.language_model"
    sites = find_sites(model)
    assert len(sites) == 8 and all(site.name.startswith("model.language_model.layers.") for site in sites)
    reasons = left_dense(model)
    assert list(reasons) == ["outside the text decoder"]
    assert any("vision_tower" in path for path in reasons["outside the text decoder"])


def test_peft_leaves_an_image_tower_alone_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match=r"8 targets outside the text decoder, such as model\.vision_tower"):
        model = get_peft_model(llava(), SponConfig(target_modules=["q_proj", "v_proj"], init_weights=False))
    layers = [path for path, module in model.named_modules() if isinstance(module, SponLayer)]
    assert len(layers) == 4 and all("language_model" in path for path in layers)
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    with pytest.warns(UserWarning, match="outside the text decoder"):
        again = PeftModel.from_pretrained(llava(), tmp_path)
    assert sum(isinstance(module, SponLayer) for module in again.modules()) == 4


def test_an_encoder_decoder_is_all_text():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = get_peft_model(T5ForConditionalGeneration(config), SponConfig(target_modules=["q"]))
    assert sum(isinstance(module, SponLayer) for module in model.modules()) == 3
