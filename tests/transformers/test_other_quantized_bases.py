# SPDX-License-Identifier: Apache-2.0
"""Adapters merged into bases that other libraries have quantized: the file keeps each one's own tensors."""

import copy
import json
from functools import partial

import pytest
import torch
from packed_words import AWQ_ORDER, pack
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, TorchAoConfig

from spon_peft import SponConfig
from spon_plugin import SparseLinear, SponError
from spon_plugin.layers.sparse_quantized import SparseQuantizedLinear
from spon_plugin.weights import weight_of
from spon_plugin.weights.importers.gptq import GPTQ

IDS = torch.arange(24).reshape(2, 12)
UP = "model.layers.0.mlp.up_proj"


def tiny():
    return make_tiny_llama(hidden_size=128, intermediate_size=256)


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs).eval()


def by_transformers(config, path):
    """Quantized while it is loaded, and saved."""
    tiny().save_pretrained(path.with_name("dense"))
    load(path.with_name("dense"), quantization_config=config).save_pretrained(path)


def bitsandbytes(path, **config):
    pytest.importorskip("bitsandbytes")
    by_transformers(BitsAndBytesConfig(**config), path)


def torchao(path, make, **config):
    by_transformers(TorchAoConfig(make(pytest.importorskip("torchao.quantization")), **config), path)


def blocks_of_fp8(path):
    """What transformers makes of a model on a GPU: FP8 with a scale for each block of 64 inputs and outputs."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    model = tiny()
    for name, linear in block_linears(model).items():
        host = FP8Linear(linear.in_features, linear.out_features, block_size=(64, 64))
        scale = linear.weight.unflatten(0, (-1, 64)).unflatten(2, (-1, 64)).abs().amax((1, 3)) / 448
        spread = scale.repeat_interleave(64, 0).repeat_interleave(64, 1)
        host.weight.data, host.weight_scale_inv.data = (linear.weight / spread).to(torch.float8_e4m3fn), scale
        model.set_submodule(name, host.requires_grad_(False))
    model.config.quantization_config = FineGrainedFP8Config(weight_block_size=(64, 64))
    model.save_pretrained(path)
    return model.eval()


def words(path, method, **config):
    """GPTQ's or AWQ's tensors, by rounding, in four bits and groups of 32; loading them takes gptqmodel and optimum."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    model = tiny()
    model.config.quantization_config = {"quant_method": method, "bits": 4, "group_size": 32, **config}
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name, linear in block_linears(model).items():
        groups = tensors.pop(f"{name}.weight").t().unflatten(0, (-1, 32))
        low, high = groups.amin(1), groups.amax(1)
        scale = ((high - low) / 15).half()
        zero = (-low / scale.float()).round().clamp(0, 15)
        codes = (groups / scale.float().unsqueeze(1) + zero.unsqueeze(1)).round().clamp(0, 15).flatten(0, 1)
        found = {"scales": scale, "qweight": pack(codes, 4, AWQ_ORDER), "qzeros": pack(zero, 4, AWQ_ORDER)}
        if method == "gptq":
            less_one = int(config["checkpoint_format"] == "gptq")
            found["qweight"] = pack(codes.t(), 4).t().contiguous()
            found["qzeros"] = pack((zero - less_one).long() & 15, 4)
            found["g_idx"] = (torch.arange(linear.in_features) // 32).int()
        tensors |= {f"{name}.{key}": tensor for key, tensor in found.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


HOSTS = {
    "bitsandbytes int8": partial(bitsandbytes, load_in_8bit=True),
    "torchao int8": partial(torchao, make=lambda ao: ao.Int8WeightOnlyConfig()),
    "torchao int4": partial(
        torchao, make=lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32))
    ),
    "torchao float8": partial(torchao, make=lambda ao: ao.Float8WeightOnlyConfig()),
    "FP8 in blocks": blocks_of_fp8,
    "GPTQ": partial(words, method="gptq", checkpoint_format="gptq", desc_act=False, sym=False),
    "GPTQ v2": partial(words, method="gptq", checkpoint_format="gptq_v2", desc_act=False, sym=False),
    "AWQ": partial(words, method="awq", version="gemm", zero_point=True),
}


def block_linears(model):
    return {path: m for path, m in model.named_modules() if hasattr(m, "in_features") and ".layers." in path}


@pytest.fixture(params=HOSTS.values(), ids=HOSTS)
def base(request, tmp_path):
    """A directory with a quantized model, and the model in memory."""
    path = tmp_path / "base"
    # transformers decodes FP8 as it loads it without a GPU: it is taken as it was made.
    return path, request.param(path) or load(path)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def decoded(model):
    """A dense model with the weights that a quantized one holds."""
    dense = tiny()
    for path, host in block_linears(model).items():
        dense.get_submodule(path).weight.data = weight_of(host).dense(torch.float32).t().contiguous()
    return dense


def sparse(model, **config):
    torch.manual_seed(1)
    return get_peft_model(model, SponConfig(init_weights=False, **config)).eval()


def same_masks(model, **config):
    """Logits of the decoded model with an adapter, and the quantized one with the same."""
    dense, model = sparse(decoded(model), **config), sparse(model, **config)
    set_peft_model_state_dict(model, get_peft_model_state_dict(dense))  # gptqmodel changes the order of modules
    return logits(dense), model


def layers(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, SparseQuantizedLinear)}


def tensors(path):
    """Those of a checkpoint, as bytes: float8 does not compare."""
    return {
        name: t.contiguous().view(torch.uint8) for name, t in load_file(path / "model.safetensors").items() if t.dim()
    }


def test_merged_saved_and_loaded_on_the_hosts_own_tensors(base, tmp_path):
    path, model = base
    expected, model = same_masks(model)
    merged = model.merge_and_unload()
    assert len(layers(merged)) == 14
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    assert len(layers(loaded)) == 14
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(copy.deepcopy(loaded)), expected, rtol=1e-4, atol=1e-4)

    before, after = tensors(path), tensors(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    kept = config["base_quantization_config"]
    if kept.get("checkpoint_format") == "gptq_v2":  # what gptqmodel's kernels make of the older format
        before = {name: tensor for name, tensor in before.items() if not name.endswith("qzeros")}
    assert before.keys() <= after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert config["quant_method"] == "spon"
    assert kept["quant_method"] == json.loads((path / "config.json").read_text())["quantization_config"]["quant_method"]

    loaded.save_pretrained(tmp_path / "again")
    again = tensors(tmp_path / "again")
    assert again.keys() == after.keys() and all(torch.equal(again[name], after[name]) for name in after)


def test_fp8_linears_without_a_mask_stay_in_fp8_too(tmp_path):
    model = blocks_of_fp8(tmp_path / "base")
    expected, model = same_masks(model, target_modules=["q_proj", "down_proj"])
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    hosts = {layer.weight.dtype for layer in block_linears(loaded).values()}
    assert hosts == {torch.float8_e4m3fn}
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


def test_a_linear_that_torchao_leaves_alone_is_merged_beside_the_others(tmp_path):
    torchao(tmp_path / "base", lambda ao: ao.Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head", UP])
    model = load(tmp_path / "base")
    assert type(model.get_submodule(UP).weight) is nn.Parameter
    expected, model = same_masks(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    assert type(loaded.get_submodule(UP)) is SparseLinear and len(layers(loaded)) == 13
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


def test_codes_without_rows_are_refused_with_what_to_do(tmp_path):
    bitsandbytes(tmp_path / "base", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = sparse(load(tmp_path / "base"))
    with pytest.raises(SponError, match=r"4-bit weight.*merge_adapter.*spon quantize"):
        model.merge_and_unload()


def test_a_base_that_transformers_cannot_save_is_refused(tmp_path, monkeypatch):
    torchao(tmp_path / "base", lambda ao: ao.Int8WeightOnlyConfig())
    model = load(tmp_path / "base")
    monkeypatch.setattr(type(model.hf_quantizer), "is_serializable", lambda self: False)
    with pytest.raises(SponError, match=r"TorchAoHfQuantizer.*can save"):
        sparse(model).merge_and_unload()


class PackedWords(nn.Module):
    """GPTQ's tensors as gptqmodel holds them: buffers, the bias among them."""

    def __init__(self, less_one):
        super().__init__()
        torch.manual_seed(0)
        self.in_features, self.out_features, self.bits = 64, 32, 4
        self.register_buffer("qweight", pack(torch.randint(0, 16, (32, 64)), 4).t().contiguous())
        self.register_buffer("qzeros", pack(torch.full((2, 32), 9 - less_one), 4))
        self.register_buffer("scales", torch.rand(2, 32).half())
        self.register_buffer("g_idx", (torch.arange(64) // 32).int())
        self.register_buffer("bias", torch.randn(32))


@pytest.mark.parametrize("version", [1, 2], ids=["converted", "as in the file"])
def test_zero_points_of_kernels_that_require_the_newer_format(version):
    host, older = PackedWords(less_one=0), PackedWords(less_one=1)
    host.REQUIRES_FORMAT_V2, host.qzero_format = True, lambda: version
    assert GPTQ.matches(host) and torch.equal(weight_of(host).dense(), weight_of(older).dense())


def test_a_layer_over_buffers_alone():
    host, x = PackedWords(less_one=1), torch.randn(2, 64)
    layer = SparseQuantizedLinear(host)
    layer.exact = True
    torch.testing.assert_close(layer(x), x @ weight_of(host).dense() + host.bias, rtol=1e-4, atol=1e-3)
    assert (
        set(layer.state_dict())
        == set(host.state_dict())
        == {*("qweight", "qzeros", "scales", "g_idx", "bias"), "spon_threshold"}
    )
