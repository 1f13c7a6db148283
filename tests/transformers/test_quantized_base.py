# SPDX-License-Identifier: Apache-2.0
"""Adapters merged into quantized bases: the codes stay the base's own, on disk and in the layers."""

import copy
import json

import pytest
import spon_models
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny_models import make_tiny_llama
from transformers import AutoModelForCausalLM, DynamicCache

from spon_peft import SponConfig
from spon_plugin import SparseLinear, SponError
from spon_plugin.layers import block_program
from spon_plugin.layers.sparse_quantized import SparseQuantizedLinear
from spon_transformers import quick_blocks
from spon_transformers.quantize import Rounding, quantize, save_quantized

pytest.importorskip("compressed_tensors", reason="pip install 'spon-plugin[quantize]'")
IDS = torch.arange(24).reshape(2, 12)
ROUNDINGS = {"int4": Rounding(4, 32), "int4 asymmetric": Rounding(4, 32, symmetric=False), "int8": Rounding(8, None)}


@pytest.fixture(params=ROUNDINGS.values(), ids=ROUNDINGS)
def base(request, tmp_path):
    """A directory with a quantized model."""
    model = make_tiny_llama(hidden_size=64, intermediate_size=128)
    quantize(model, request.param)
    save_quantized(model, tmp_path / "base")
    return tmp_path / "base"


def load(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def sparse(path, dtype=torch.float32, **config):
    torch.manual_seed(1)
    return get_peft_model(load(path, dtype), SponConfig(init_weights=False, **config)).eval()


def layers(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, SparseQuantizedLinear)}


@pytest.mark.parametrize(
    "config",
    [{}, {"dense_prefix": 1}, {"channel_modules": "all", "center_modules": "all"}],
    ids=["plain", "first position dense", "channels and centres"],
)
def test_merged_saved_and_loaded_it_computes_what_peft_computes(base, tmp_path, config):
    expected = logits(sparse(base, **config))
    merged = sparse(base, **config).merge_and_unload()
    assert len(layers(merged)) == 14
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(load(base)), expected, atol=1e-2), "masks and alphas do something"
    merged.save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    assert len(layers(loaded)) == 14
    assert torch.equal(logits(loaded), logits(merged))
    torch.testing.assert_close(logits(copy.deepcopy(loaded)), expected, rtol=1e-4, atol=1e-4)


def test_the_file_has_the_tensors_of_the_base_as_they_were(base, tmp_path):
    sparse(base).merge_and_unload().save_pretrained(tmp_path / "merged")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: t for name, t in after.items() if name in before}.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    added = {name.rpartition(".")[2] for name in after.keys() - before.keys()}
    assert added == {"bias", "spon_threshold", "spon_dense_bias"}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    own = json.loads((base / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "spon"
    kept = config["base_quantization_config"]
    assert (kept["quant_method"], kept["format"]) == (own["quant_method"], own["format"])
    assert (
        kept["config_groups"]["group_0"]["weights"]["num_bits"]
        == own["config_groups"]["group_0"]["weights"]["num_bits"]
    )


def test_masked_inputs_leave_codes_unread(base):
    merged = sparse(base).merge_and_unload()
    layer = next(iter(layers(merged).values()))
    x = torch.randn(1, layer.in_features)
    layer.spon_threshold = torch.full((1,), float(x.abs().median()))
    expected = layer(x)
    masked = x[0].abs() <= layer.spon_threshold
    layer.row_weight.codes[masked] ^= 0x55
    assert torch.equal(layer(x), expected)
    layer.row_weight.codes[~masked] ^= 0x55
    assert not torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [None, ["down_proj"]], ids=["all", "some"])
def test_what_compressed_tensors_has_decompressed_is_packed_again(base, tmp_path, targets, dtype):
    model = sparse(base, dtype, target_modules=targets)
    expected = logits(model)  # the first pass of a compressed-tensors model decompresses it
    model.merge_and_unload().save_pretrained(tmp_path / "late")
    sparse(base, dtype, target_modules=targets).merge_and_unload().save_pretrained(tmp_path / "early")
    late, early = (load_file(tmp_path / name / "model.safetensors") for name in ("late", "early"))
    assert late.keys() == early.keys()
    assert all(torch.equal(late[name], early[name]) for name in early if "weight" in name)
    if dtype == torch.float32:  # in bfloat16 inputs near their thresholds are kept or dropped as the sums fall out
        torch.testing.assert_close(logits(load(tmp_path / "late")), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def decoded(model):
    """The logits of three tokens, one at a time, after a prompt; of the last step, how many blocks ran as a program."""
    runs, run = [], block_program.run_blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            quick_blocks, "run_blocks", lambda programs, *rest: (runs.append(len(programs)), run(programs, *rest))[1]
        )
        cache = DynamicCache(config=model.config)
        found = [model(ids, past_key_values=cache).logits[0, -1] for ids in IDS[:1].split([9, 1, 1, 1], 1)]
    return torch.stack(found[1:]), runs[-1] if runs else 0


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]], ids=["all linears", "some linears"])
def test_no_look_at_a_tensor_goes_through_offloading(base, tmp_path, targets):
    config = {"target_modules": targets} if targets else {}
    expected, _ = decoded(sparse(base, **config))
    merged = sparse(base, **config).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for model in (merged, load(tmp_path / "merged")):
        for layer in layers(model).values():
            layer.exact = True
        found, together = decoded(model)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert all(type(module._parameters) is dict is type(module._buffers) for module in model.modules())
        assert not any("forward" in block.__dict__ for block in model.model.layers)
        assert together == (0 if targets else 2)


def test_a_linear_that_the_base_leaves_in_floating_point_is_merged_beside_the_others(tmp_path):
    model = make_tiny_llama(hidden_size=64, intermediate_size=128)
    path = "model.layers.1.mlp.up_proj"
    kept = model.get_submodule(path).weight.clone()
    quantize(model, ROUNDINGS["int4"])
    model.set_submodule(path, torch.nn.Linear(64, 128, bias=False))
    model.get_submodule(path).weight.data = kept
    save_quantized(model, tmp_path / "base")
    expected = logits(sparse(tmp_path / "base"))
    sparse(tmp_path / "base").merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    assert type(loaded.get_submodule(path)) is SparseLinear and len(layers(loaded)) == 13
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runs_first", [False, True], ids=["packed", "decompressed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # without biases, and with some
def test_merging_in_place_and_back(kind, dtype, runs_first, tmp_path):
    model = spon_models.tiny(kind)
    quantize(model, Rounding(8, None))
    save_quantized(model, tmp_path / "base")
    model = sparse(tmp_path / "base", dtype, dense_prefix=0)
    biases = [layer.get_base_layer().bias for layer in spon_models.layers(model)]
    before = [None if bias is None else bias.detach().clone() for bias in biases]
    if runs_first:
        unmerged = logits(model)
    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    if not runs_first:
        unmerged = logits(model)
    for layer, bias in zip(spon_models.layers(model), before, strict=True):
        own = layer.get_base_layer().bias
        assert own is None if bias is None else torch.equal(own, bias)
    assert torch.equal(logits(model), unmerged)
    close = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(merged, unmerged, rtol=close, atol=close * float(unmerged.abs().max()))


def test_an_adapter_on_what_the_base_leaves_in_floating_point_alone(tmp_path):
    model = make_tiny_llama(hidden_size=64, intermediate_size=128)
    kept = {p: m.weight.clone() for p, m in model.named_modules() if p.endswith("down_proj")}
    quantize(model, ROUNDINGS["int8"])
    for path, weight in kept.items():
        model.set_submodule(path, torch.nn.Linear(128, 64, bias=False))
        model.get_submodule(path).weight.data = weight
    save_quantized(model, tmp_path / "base")
    expected = logits(sparse(tmp_path / "base", target_modules=["down_proj"]))
    merged = sparse(tmp_path / "base", target_modules=["down_proj"]).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-4)


def test_a_missing_tensor_is_named(base, tmp_path):
    sparse(base, center_modules="all").merge_and_unload().save_pretrained(tmp_path / "merged")
    from safetensors.torch import save_file

    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.down_proj.spon_center"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SponError, match="down_proj.spon_center"):
        load(tmp_path / "merged")
