# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spon_plugin import SponError, fold_alpha
from spon_plugin.weights import Opaque, product, weight_of
from spon_plugin.weights.dense import DenseWeight


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
    monkeypatch.setattr(product, "_CPU_CHUNK", chunk)
    layer = linear(kind, torch.float64)
    alpha = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: weight_of(layer).product(a), alpha)
    layer.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda w, a: DenseWeight(w).product(a), (weight_of(layer).codes, alpha))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [14, 1 << 20])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_half_precision_is_multiplied_in_float32(kind, dtype, chunk, monkeypatch):
    monkeypatch.setattr(product, "_CPU_CHUNK", chunk)
    layer = linear(kind, dtype).requires_grad_(False)
    alpha = torch.randn(7, requires_grad=True)
    out = weight_of(layer).product(alpha)
    weight = layer.weight.double() if kind == "linear" else layer.weight.double().t()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), weight @ alpha.double())
    out.sum().backward()
    torch.testing.assert_close(alpha.grad.double(), weight.sum(0))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_is_the_fold_of_the_core(kind):
    layer, alpha = linear(kind), torch.randn(7)
    assert torch.equal(weight_of(layer).product(alpha), fold_alpha(layer, alpha))


def test_only_the_weight_itself_is_kept_for_backward():
    layer = linear("linear", torch.bfloat16).requires_grad_(False)
    alpha = torch.randn(7, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        weight_of(layer).product(alpha)
    assert {t.data_ptr() for t in kept} == {layer.weight.data_ptr(), alpha.data_ptr()}


def test_autocast_does_not_lower_it():
    layer, alpha = linear("linear"), torch.randn(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = weight_of(layer).product(alpha)
    assert torch.equal(inside, weight_of(layer).product(alpha))


@pytest.mark.parametrize("bias", [True, False])
def test_packed_weight_is_asked(bias):
    layer = PackedLinear(7, 5, bias)
    alpha = torch.randn(7, requires_grad=True)
    out = weight_of(layer).product(alpha)
    torch.testing.assert_close(out, layer.weight.float() / 100 @ alpha)
    out.sum().backward()
    torch.testing.assert_close(alpha.grad, layer.weight.float().sum(0) / 100)


class Clipped(nn.Linear):
    """A linear that does not multiply its weight as it is."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.clamp(-0.1, 0.1), self.bias)


def test_a_forward_of_its_own_is_asked():
    torch.manual_seed(0)
    layer, alpha = Clipped(7, 5), torch.randn(7)
    weight = weight_of(layer)
    assert isinstance(weight, Opaque) and weight.reason == "Clipped has a forward of its own"
    torch.testing.assert_close(fold_alpha(layer, alpha), layer.weight.clamp(-0.1, 0.1) @ alpha)


def test_a_weight_that_has_no_values_yet_is_named():
    with pytest.raises(SponError, match="weight: got 'the meta device', expected values"):
        fold_alpha(nn.Linear(7, 5, device="meta"), torch.zeros(7))


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_bits_do_not_depend_on_where_the_weight_lies(offset):
    torch.manual_seed(0)
    storage, alpha = torch.empty(576 * 192 + 64), torch.randn(576)
    whole = torch.randn(192, 576)
    start = (-storage.data_ptr() % 64) // 4 + offset
    shifted = storage[start : start + whole.numel()].view_as(whole).copy_(whole)
    assert torch.equal(DenseWeight(shifted.t()).product(alpha), DenseWeight(whole.clone().t()).product(alpha))
