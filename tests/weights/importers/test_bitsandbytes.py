# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from spon_plugin import fold_alpha
from spon_plugin.weights import weight_of

bnb = pytest.importorskip("bitsandbytes")


def quantized(layer, dtype=torch.float32):
    torch.manual_seed(0)
    layer.load_state_dict(nn.Linear(128, 64, dtype=dtype).state_dict())
    return layer.to("cpu")


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a forward pass"])
def test_8bit(used):
    """LLM.int8() itself would quantize alpha to int8, 1% of its largest entry; the fold does not."""
    layer = quantized(bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=0.0))
    host = bnb.functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
    if used:
        layer(torch.randn(3, 128))
    weight, alpha = weight_of(layer), torch.randn(128)
    assert weight.format == "int8"
    torch.testing.assert_close(weight.dense(), host.t(), rtol=2e-7, atol=0)  # one rounding: of the scale over 127
    torch.testing.assert_close(fold_alpha(layer, alpha), host @ alpha, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double quantization"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_4bit(kind, nested, compute):
    """The compute dtype is that of the host's products; the fold is in float32 all the same."""
    layer = quantized(bnb.nn.Linear4bit(128, 64, quant_type=kind, compute_dtype=compute, compress_statistics=nested))
    host = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    weight, alpha = weight_of(layer), torch.randn(128, requires_grad=True)
    torch.testing.assert_close(weight.dense(), host.t(), rtol=1e-6, atol=1e-8)
    folded = weight.product(alpha)
    torch.testing.assert_close(folded, host @ alpha, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(folded.sum(), alpha)
    torch.testing.assert_close(grad, host.sum(0), rtol=1e-5, atol=1e-6)
