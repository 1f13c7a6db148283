# SPDX-License-Identifier: Apache-2.0
"""Models rounded by `spon_transformers.quantize`: read back by transformers and by us, or refused untouched."""

import json

import pytest
import torch
from tiny_models import make_tiny_llama
from transformers import AutoModelForCausalLM

from spon_plugin import SponError
from spon_plugin.decoder.sites import find_sites
from spon_plugin.weights import weight_of
from spon_transformers.quantize import Rounding, bits_per_weight, quantize, save_quantized

pytest.importorskip("compressed_tensors", reason="pip install 'spon-plugin[quantize]'")
IDS = torch.arange(24).reshape(2, 12)
ROUNDINGS = {
    "int4": Rounding(4, 32),
    "int4 asymmetric": Rounding(4, 32, symmetric=False),
    "int8": Rounding(8, None),
    "int8 groups": Rounding(8, 64),
    "int4 with head": Rounding(4, 32, head=True),
}


def model(tied=False, dtype=torch.float32):
    return make_tiny_llama(tie_word_embeddings=tied, hidden_size=64, intermediate_size=128).to(dtype)


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
@torch.no_grad()
def test_read_back_it_is_the_model_whose_weights_are_the_rounded_ones(tmp_path, rounding):
    dense, rounded = model(), model()
    paths = quantize(rounded, rounding)
    wanted = {path for site in find_sites(dense) for path in site.modules}
    assert set(paths) == wanted | ({"lm_head"} if rounding.head else set())
    for path in paths:  # the reference: the dense model with what the codes stand for
        linear, weight = dense.get_submodule(path), weight_of(rounded.get_submodule(path))
        assert weight.format == f"int{rounding.bits}"
        values = weight.dense().t()
        step = (linear.weight.abs().max() * 2 / (2**rounding.bits - 1)).float()
        assert (values - linear.weight).abs().max() < 2.5 * step
        linear.weight.copy_(values)
    save_quantized(rounded, tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert config["ignore"] == ([] if rounding.head else ["lm_head"])
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "q", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(IDS).logits, dense(IDS).logits)


def test_a_tied_head_is_rounded_apart_from_the_embeddings(tmp_path):
    rounded = model(tied=True)
    embeddings = rounded.get_input_embeddings().weight.clone()
    quantize(rounded, Rounding(8, None, head=True))
    save_quantized(rounded, tmp_path / "q")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert torch.equal(loaded.get_input_embeddings().weight, embeddings)
    assert not loaded.config.tie_word_embeddings and weight_of(loaded.lm_head).format == "int8"


def test_clipped_ranges_round_better_than_the_largest_weight_does(monkeypatch):
    def error():
        rounded, dense = model(), model()
        paths = quantize(rounded, Rounding(4, 64))
        differences = [
            weight_of(rounded.get_submodule(p)).dense() - dense.get_submodule(p).weight.t().float() for p in paths
        ]
        return sum(difference.square().sum().item() for difference in differences)

    searched = error()
    monkeypatch.setattr("spon_transformers.quantize.RANGES", (1.0,))
    assert searched < 0.95 * error()


def test_bits_of_a_weight_count_scales_and_zero_points():
    rounded = model(dtype=torch.bfloat16)
    quantize(rounded, Rounding(4, 32))
    assert bits_per_weight(rounded) == 4 + 16 / 32


@pytest.mark.parametrize(
    ("rounding", "message"),
    [
        (Rounding(3), "bits: got 3, expected 8 or 4"),
        (Rounding(4, 48), "group: got 48, expected a divisor of every linear's in_features"),
        (Rounding(4, 0), "group: got 0"),
    ],
    ids=["bits", "group", "zero"],
)
def test_a_wrong_rounding_is_refused_before_anything_changes(rounding, message):
    rounded = model()
    with pytest.raises(SponError, match=message):
        quantize(rounded, rounding)
    assert all(torch.equal(a, b) for a, b in zip(rounded.parameters(), model().parameters(), strict=True))


def test_a_tied_head_stays_tied_where_the_rounding_is_refused():
    rounded = model(tied=True)
    with pytest.raises(SponError, match="group"):
        quantize(rounded, Rounding(4, 48, head=True))
    assert rounded.lm_head.weight is rounded.get_input_embeddings().weight and rounded.config.tie_word_embeddings


def test_a_quantized_model_is_refused(tmp_path):
    rounded = model()
    quantize(rounded, Rounding(4, 32))
    save_quantized(rounded, tmp_path / "q")
    with pytest.raises(SponError, match="floating-point weights"):
        quantize(AutoModelForCausalLM.from_pretrained(tmp_path / "q"), Rounding(4, 32))
