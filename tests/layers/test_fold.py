# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import spon_plugin.layers.fold as fold
from spon_plugin import fold_alpha
from spon_plugin.layers.fold import weight_product


class PackedLinear(nn.Module):
    """A linear whose weight lies in int8, as in bitsandbytes."""

    def __init__(self, in_features, out_features, bias):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.randint(-127, 127, (out_features, in_features), dtype=torch.int8))
        self.bias = nn.Parameter(torch.randn(out_features)) if bias else None

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 100, self.bias)


def linear(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return (nn.Linear(7, 5) if kind == "linear" else Conv1D(5, 7)).to(dtype)


@pytest.mark.parametrize("chunk", [1, 14, 1 << 20])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradients(kind, chunk, monkeypatch):
    monkeypatch.setattr(fold, "_CPU_CHUNK", chunk)
    layer = linear(kind, torch.float64)
    alpha = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: weight_product(layer, a, torch.float64), alpha)
    layer.requires_grad_(True)
    torch.autograd.gradcheck(lambda w, a: fold._WeightProduct.apply(w, a), (layer.weight, torch.randn(
        layer.weight.shape[1], dtype=torch.float64, requires_grad=True)))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [14, 1 << 20])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_half_precision_is_multiplied_in_float32(kind, dtype, chunk, monkeypatch):
    monkeypatch.setattr(fold, "_CPU_CHUNK", chunk)
    layer = linear(kind, dtype).requires_grad_(False)
    alpha = torch.randn(7, requires_grad=True)
    out = weight_product(layer, alpha, dtype)
    weight = layer.weight.double() if kind == "linear" else layer.weight.double().t()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), weight @ alpha.double())
    out.sum().backward()
    torch.testing.assert_close(alpha.grad.double(), weight.sum(0))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_is_the_fold_of_the_core(kind):
    layer, alpha = linear(kind), torch.randn(7)
    assert torch.equal(weight_product(layer, alpha, torch.float32), fold_alpha(layer, alpha))


def test_only_the_weight_itself_is_kept_for_backward():
    layer = linear("linear", torch.bfloat16).requires_grad_(False)
    alpha = torch.randn(7, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        weight_product(layer, alpha, torch.bfloat16)
    assert {t.data_ptr() for t in kept} == {layer.weight.data_ptr(), alpha.data_ptr()}


def test_autocast_does_not_lower_it():
    layer, alpha = linear("linear"), torch.randn(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = weight_product(layer, alpha, torch.bfloat16)
    assert torch.equal(inside, weight_product(layer, alpha, torch.float32))


@pytest.mark.parametrize("bias", [True, False])
def test_packed_weight_is_asked(bias):
    layer = PackedLinear(7, 5, bias)
    alpha = torch.randn(7, requires_grad=True)
    out = weight_product(layer, alpha, torch.float32)
    torch.testing.assert_close(out, layer.weight.float() / 100 @ alpha)
    out.sum().backward()
    torch.testing.assert_close(alpha.grad, layer.weight.float().sum(0) / 100)
