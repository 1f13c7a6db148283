# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, FP8Linear

from spon_plugin import fold_alpha
from spon_plugin.weights import Opaque, weight_of

FLOAT8 = torch.float8_e4m3fn


def fp8_linear(block):
    layer = FP8Linear(192, 80, block_size=block)
    layer.weight.data = torch.randn(80, 192).to(FLOAT8)
    layer.weight_scale_inv.data = torch.rand_like(layer.weight_scale_inv) + 0.5
    return layer


def by_hand(layer):
    """The values, as the definition of each layout has them."""
    codes = layer.weight.double()
    if isinstance(layer, FbgemmFp8Linear):
        return codes * layer.weight_scale.double()
    scale = layer.weight_scale_inv.double()
    if layer.block_size is not None:
        scale = scale.repeat_interleave(layer.block_size[0], 0).repeat_interleave(layer.block_size[1], 1)[:80, :192]
    return codes * scale


def fbgemm():
    layer = FbgemmFp8Linear(192, 80, bias=False)
    layer.weight.data = torch.randn(80, 192).to(FLOAT8)
    layer.weight_scale.data = torch.rand(80, 1) + 0.5
    return layer


MAKES = {
    "per tensor": lambda: fp8_linear(None),
    "blocks": lambda: fp8_linear((32, 64)),
    "blocks that do not divide": lambda: fp8_linear((64, 128)),
    "per output": fbgemm,
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_fp8_is_folded_with_its_scales(make):
    torch.manual_seed(0)
    layer, alpha = make(), torch.randn(192)
    weight = weight_of(layer)
    assert weight.format == "fp8" and weight.row_bytes == 80
    torch.testing.assert_close(weight.dense().double(), by_hand(layer).t(), rtol=1e-7, atol=0)
    torch.testing.assert_close(fold_alpha(layer, alpha).double(), by_hand(layer) @ alpha.double(), rtol=1e-5, atol=1e-5)


def test_blocks_are_what_transformers_dequantizes():
    torch.manual_seed(0)
    layer = fp8_linear((16, 64))
    host = Fp8Dequantize(type("Q", (), {"quantization_config": type("C", (), {"weight_block_size": (16, 64)})})())
    found = host._dequantize_one(layer.weight.data, layer.weight_scale_inv.data)
    assert torch.equal(weight_of(layer).dense(found.dtype), found.t())


def test_blocks_that_are_as_many_as_outputs():
    """16,384 inputs in blocks of 128 x 128 have one scale for each output, by number."""
    torch.manual_seed(0)
    layer = FP8Linear(64, 24, block_size=(8, 8))
    layer.weight.data = torch.randn(24, 64).to(FLOAT8)
    layer.weight_scale_inv.data = torch.rand_like(layer.weight_scale_inv) + 0.5
    assert layer.weight_scale_inv.numel() == 24
    scale = layer.weight_scale_inv.double().repeat_interleave(8, 0).repeat_interleave(8, 1)
    torch.testing.assert_close(weight_of(layer).dense().double(), (layer.weight.double() * scale).t())


def test_int8_with_zero_points():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    layer.weight = nn.Parameter(torch.randint(-128, 127, (32, 64), dtype=torch.int8), requires_grad=False)
    layer.weight_scale = torch.rand(32, 1)
    layer.weight_zero_point = torch.randint(-8, 8, (32, 1), dtype=torch.int8)
    expected = (layer.weight.double() - layer.weight_zero_point.double()) * layer.weight_scale.double()
    weight = weight_of(layer)
    assert weight.format == "int8"
    torch.testing.assert_close(weight.dense().double(), expected.t(), rtol=1e-6, atol=1e-8)


def test_float8_without_scales_is_asked():
    """A weight that some host scales in a way of its own must not be multiplied as it lies."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype) * 0.25, self.bias)

    torch.manual_seed(0)
    layer, alpha = Scaled(64, 32), torch.randn(64)
    layer.weight = nn.Parameter(torch.randn(32, 64).to(FLOAT8), requires_grad=False)
    assert isinstance(weight_of(layer), Opaque)
    torch.testing.assert_close(fold_alpha(layer, alpha), layer.weight.float() * 0.25 @ alpha)
