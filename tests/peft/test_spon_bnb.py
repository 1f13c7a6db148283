# SPDX-License-Identifier: Apache-2.0
"""Quantized bases of bitsandbytes, on the CPU."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from torch import nn

from spon_peft import SponConfig, SponLayer
from spon_plugin import SponError, sparsify
from spon_plugin.weights import weight_of


def quantized(kind, bias):
    torch.manual_seed(0)
    dense = nn.Linear(128, 64, bias=bias)
    if kind == "8bit":
        layer = bnb.nn.Linear8bitLt(128, 64, bias=bias, has_fp16_weights=False, threshold=0.0)
    else:
        layer = bnb.nn.Linear4bit(128, 64, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(dense.state_dict())
    return nn.Sequential(layer.to("cpu"))


@pytest.fixture(params=["8bit", "4bit"])
def kind(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["bias", "no-bias"])
def base(request, kind):
    return quantized(kind, request.param)


def wrap(base):
    torch.manual_seed(1)
    return get_peft_model(base, SponConfig(target_modules=["0"], init_weights=False))


def test_forward_is_mask_and_fold(base, kind):
    x = torch.randn(6, 128)
    model = wrap(base)
    layer = next(m for m in model.modules() if isinstance(m, SponLayer))
    linear, alpha = layer.get_base_layer(), layer.spon_alpha["default"]
    assert alpha.dtype == torch.float32 and layer.quantization_backend.backend_name == f"bnb {kind}"
    with torch.no_grad():
        rows = linear(torch.stack([alpha, torch.zeros_like(alpha)]))
        expected = linear(sparsify(x, layer.spon_threshold["default"])) + (rows[0] - rows[1])
        torch.testing.assert_close(model(x), expected)
        assert not torch.allclose(model(x), linear(x), atol=1e-2)


def test_alpha_trains(base):
    model = wrap(base)
    x = torch.randn(6, 128)
    (alpha,) = [p for p in model.parameters() if p.requires_grad]
    model(x).pow(2).sum().backward()
    step = alpha.grad.norm()
    assert step > 0
    before = model(x).pow(2).sum()
    with torch.no_grad():
        alpha -= 1e-2 * alpha.grad / step
    assert model(x).pow(2).sum() < before


def test_merge_and_unmerge(base):
    x = torch.randn(6, 128)
    with torch.no_grad():
        dense = base(x)
        model = wrap(base)
        layer = next(m for m in model.modules() if isinstance(m, SponLayer))
        weight, bias = copy.deepcopy(layer.weight), layer.bias
        before = model(x)
        model.merge_adapter(safe_merge=True)
        assert layer.bias is not bias
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
        model.unmerge_adapter()
        assert layer.bias is bias and torch.equal(layer.weight, weight) and torch.equal(model(x), before)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), dense)
        assert torch.equal(model.unload()(x), dense)


def test_merge_and_unload_of_rows_alone(base, kind):
    """int8 lies by rows, with a scale for each output. bitsandbytes itself would round the inputs, too."""
    if kind == "4bit":
        with pytest.raises(SponError, match="merge_adapter"):
            wrap(base).merge_and_unload()
        return
    model, x = wrap(base), torch.randn(6, 128)
    layer = next(m for m in model.modules() if isinstance(m, SponLayer))
    mask, linear = layer.mask_of("default"), layer.get_base_layer()
    with torch.no_grad():
        bias = 0 if linear.bias is None else linear.bias
        expected = (sparsify(x, mask.threshold) + mask.alpha) @ weight_of(linear).dense() + bias
        torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-4)
