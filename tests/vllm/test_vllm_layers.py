# SPDX-License-Identifier: Apache-2.0
"""Single layers of vLLM's: what survives a reload, what is folded, and what vLLM must not do around them."""

from types import SimpleNamespace

import pytest
import torch
from layers import load, make_layer, one_process
from quantized import W8A8, int8

from spon_plugin import Mask, SponError
from spon_vllm.fold import ask, product
from spon_vllm.stored import stored_weight

IN = 64


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    with one_process(tmp_path_factory.mktemp("group")):
        yield


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASK = Mask(0.5 * random(IN, seed=1).abs(), 0.3 * random(IN, seed=3), 0.1 * random(IN, seed=2))


def expected(x, weight, bias, mask=MASK):
    """What a sparse layer computes, in float64: ``W S(x) + b + W alpha``."""
    x, weight = x.double(), weight.double()
    center = 0 if mask.center is None else mask.center.double()
    kept = torch.where((x - center).abs() > mask.threshold.double(), x, center)
    alpha = 0 if mask.alpha is None else mask.alpha.double()
    return (kept + alpha) @ weight.t() + (0 if bias is None else bias.double())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_loading_weights_again_folds_again(bias):
    from vllm.model_executor.model_loader.reload.layerwise import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    model = make_layer([32], IN, [MASK], bias=bias)
    record_metadata_for_reloading(model)
    tensors = [
        {"weight": random(32, IN, seed=seed), **({"bias": random(32, seed=seed)} if bias else {})} for seed in (4, 5)
    ]
    load(model.l, **tensors[0])
    model.l.quant_method.process_weights_after_loading(model.l)
    x = random(3, IN, seed=6)
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.l(x)[0].double(), expected(x, *_both(tensors[0])), **close)
    places = {name: parameter.data_ptr() for name, parameter in model.l.named_parameters()}

    initialize_layerwise_reload(model)
    load(model.l, **tensors[1])
    finalize_layerwise_reload(model, None)
    torch.testing.assert_close(model.l(x)[0].double(), expected(x, *_both(tensors[1])), **close)
    assert {name: parameter.data_ptr() for name, parameter in model.l.named_parameters()} == places  # graphs hold them


def _both(tensors):
    return tensors["weight"], tensors.get("bias")


def test_offloaded_weight_goes_back_to_the_host():
    """`--cpu-offload-gb`: vLLM moves back what has no such mark after processing, and skips what still has it."""
    model = make_layer([32], IN, [MASK])
    load(model.l, weight=random(32, IN))
    model.l.weight._vllm_is_uva_offloaded = True
    model.l.quant_method.process_weights_after_loading(model.l)
    assert not getattr(model.l.weight, "_vllm_is_uva_offloaded", False)


def test_no_layer_before_quantizes_the_input():
    fusion = pytest.importorskip("vllm.model_executor.layers.fusion.quant_activation")
    model = make_layer([32], IN, [MASK])
    load(model.l, weight=random(32, IN))
    model.l._input_quant_key = "of a kernel that takes FP8"
    model.l.quant_method.process_weights_after_loading(model.l)
    assert fusion.get_input_quant_key(model.l) is None
    model.l._input_quant_key = "of a kernel that takes FP8"  # as a method may set it later
    assert fusion.get_input_quant_key(model.l) is None


def test_missing_weight_of_a_fused_layer():
    model = make_layer([16, 32], IN, [Mask(MASK.threshold)] * 2)
    weight = model.l.weight
    weight.weight_loader(weight, random(16, IN), 0)
    with pytest.raises(SponError, match=r"shard1\.weight: got 'no such tensor, or NaN'.*incomplete"):
        model.l.quant_method.process_weights_after_loading(model.l)


def test_w8a8_folds_the_weight_and_not_rounded_alphas():
    """Half of these alphas are large: rounding them together with the small ones to 8 bits would lose those."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    alphas = [0.05 * random(IN, seed=seed) + 20 * (torch.arange(IN) == 7) for seed in (1, 2)]
    masks = [Mask(torch.tensor([0.5]), alpha=alpha) for alpha in alphas]
    model = make_layer([32, 64], IN, masks, inner=CompressedTensorsConfig.from_config(W8A8), dtype=torch.bfloat16)
    parts = [int8(random(size, IN, seed=size)) for size in (32, 64)]
    load(model.l, weight=[codes for codes, _ in parts], weight_scale=[scales for _, scales in parts])
    model.l.quant_method.process_weights_after_loading(model.l)
    meant = [codes.double() * scales.double() for codes, scales in parts]
    folded = torch.cat([weight @ alpha.double() for weight, alpha in zip(meant, alphas, strict=True)])
    torch.testing.assert_close(model.l.spon_bias.double(), folded, rtol=1e-5, atol=1e-4)
    x = torch.zeros(3, IN, dtype=torch.bfloat16)  # all masked: what is left is the bias
    torch.testing.assert_close(model.l(x)[0].double(), folded.expand(3, -1), rtol=0.01, atol=0.01)


FORMATS = {
    "float": lambda w: ({"weight": w.bfloat16()}, w.bfloat16()),
    "int8, by output": lambda w: ({"weight": int8(w)[0], "weight_scale": int8(w)[1]}, int8(w)[0] * int8(w)[1]),
    "float8, one scale": lambda w: ({"weight": float8(w), "weight_scale": torch.tensor(0.5)}, 0.5 * float8(w).float()),
    "float8, by linear": lambda w: (
        {"weight": float8(w), "weight_scale": torch.tensor([0.5, 2.0])},
        float8(w).float() * torch.tensor([0.5] * 16 + [2.0] * 32).unsqueeze(1),
    ),
    "float8, by output": lambda w: (
        {"weight": float8(w), "weight_scale": w.abs().amax(1)}, float8(w).float() * w.abs().amax(1, keepdim=True)
    ),
    "float8, blocks of 16x32": lambda w: (
        {"weight": float8(w), "weight_scale_inv": BLOCKS, "weight_block_size": [16, 32]},
        float8(w).float() * BLOCKS.repeat_interleave(16, 0).repeat_interleave(32, 1),
    ),
    "float8, exponents of 32 inputs": lambda w: (
        {"weight": float8(w), "weight_scale": EXPONENTS},
        float8(w).float() * 2.0 ** (EXPONENTS.float() - 127).repeat_interleave(32, 1),
    ),
    "GPTQ in act-order": lambda w: act_order(w),  # vLLM 0.32 refuses it, earlier ones do not
}  # fmt: skip
BLOCKS = 0.5 + torch.arange(6.0).reshape(3, 2)
EXPONENTS = torch.randint(120, 134, (48, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def act_order(weight, group=32):
    """GPTQ's tensors, the groups of inputs in disorder, and what they mean."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import gptq_pack, pack_cols

    (outputs, inputs), generator = weight.shape, torch.Generator().manual_seed(0)
    g_idx = (torch.arange(inputs) // group)[torch.randperm(inputs, generator=generator)]
    scales = 0.1 + torch.rand(inputs // group, outputs, generator=generator)
    codes = (weight.t() / scales[g_idx] + 8).round().clamp(0, 15).int()
    qzeros = pack_cols(torch.full_like(scales, 7, dtype=torch.int32), 4, *scales.shape)
    tensors = {"qweight": gptq_pack(codes, 4, inputs, outputs), "qzeros": qzeros, "scales": scales}
    return {**tensors, "g_idx": g_idx.int()}, ((codes - 8) * scales[g_idx]).t()


def float8(weight):
    return weight.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("name", FORMATS)
def test_weight_as_it_is_stored(name):
    tensors, meant = FORMATS[name](random(48, IN))
    stored, alpha = stored_weight(SimpleNamespace(**tensors), [16, 32], IN), random(IN, seed=1)
    for start, stop in ((0, 16), (16, 48), (5, 48)):
        expected = meant[start:stop].double() @ alpha.double()
        torch.testing.assert_close(product(stored, alpha, start, stop).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param({"qweight": torch.zeros(8, 48, dtype=torch.int32)}, id="packed"),
        pytest.param({"weight": torch.zeros(48, IN // 2, dtype=torch.uint8), "weight_scale": BLOCKS}, id="4 bits"),
        pytest.param({"weight": float8(torch.ones(48, IN))}, id="float8 without its scales"),
        pytest.param(
            {"weight": float8(torch.ones(48, IN)), "weight_scale": BLOCKS, "weight_block_size": [24, 32]},
            id="blocks across linears",
        ),
    ],
)
def test_weight_that_cannot_be_read(tensors):
    assert stored_weight(SimpleNamespace(**tensors), [16, 32], IN) is None


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_method_that_rounds_inputs_to_few_bits_is_not_asked(bits):
    weight, alpha = random(48, IN), random(IN, seed=1)

    def apply(layer, x, bias):
        step = x.float().abs().amax(-1, keepdim=True).clamp(1e-9) / (2 ** (bits - 1) - 1)
        return (x.float() / step).round() * step @ weight.t()

    layer = SimpleNamespace(params_dtype=torch.bfloat16)
    if bits == 4:
        with pytest.raises(SponError, match="m.l: got 'SimpleNamespace, which rounds inputs.*adapter without alpha"):
            ask(SimpleNamespace(apply=apply), layer, alpha, 48, "m.l")
    else:
        asked = ask(SimpleNamespace(apply=apply), layer, alpha, 48, "m.l")
        assert (asked - weight @ alpha).norm() < 0.02 * (weight @ alpha).norm()
