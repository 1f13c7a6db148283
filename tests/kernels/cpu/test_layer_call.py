# SPDX-License-Identifier: Apache-2.0
"""`LayerCall`, a layer's short way to the CPU kernel: the operator's results; it steps aside where it must."""

import copy
import pickle

import pytest
import torch
from torch import nn

import spon_plugin.layers.sparse_linear as layers
from spon_plugin.kernels import sparse_linear
from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.layers.sparse_linear import SparseConv1D, SparseLinear


@pytest.fixture(autouse=True)
def installed() -> None:
    if not cpu.is_available():
        pytest.skip("the CPU kernel needs Numba and the calls of GNU's OpenMP")


def make_layer(kind: type = SparseLinear, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = SparseLinear(70, 40, bias, dtype=dtype) if kind is SparseLinear else SparseConv1D(40, 70, dtype=dtype)
    layer.spon_threshold.fill_(0.5)
    layer.arrange_for_kernels()
    return layer.requires_grad_(False)


@pytest.fixture
def operator_calls(monkeypatch) -> list[int]:
    """Grows with every call of the operator by a layer, that is, whenever the short way was not taken."""
    calls: list[int] = []
    monkeypatch.setattr(layers, "sparse_linear", lambda *args: calls.append(1) or sparse_linear(*args))
    return calls


def expected(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return sparse_linear(x, layer.weight_t, layer.spon_threshold, layer.bias)


@pytest.mark.parametrize("shape", [(70,), (1, 70), (1, 1, 70), (2, 3, 70), (8, 70)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_rows_are_those_of_the_operator(operator_calls, dtype, bias, shape):
    layer, x = make_layer(dtype=dtype, bias=bias), torch.randn(shape).to(dtype)
    for _ in range(2):
        y = layer(x)
        assert y.shape == (*shape[:-1], 40) and torch.equal(y, expected(layer, x))
    assert not operator_calls


def test_conv1d_takes_the_short_way(operator_calls):
    layer, x = make_layer(SparseConv1D), torch.randn(3, 70)
    assert torch.equal(layer(x), expected(layer, x)) and not operator_calls


def test_threshold_of_every_channel_and_strided_input(operator_calls):
    layer, x = make_layer(), torch.randn(4, 140)[:, ::2]
    layer.spon_threshold = torch.rand(70)
    assert torch.equal(layer(x), expected(layer, x)) and not operator_calls


def swap_bias(layer):
    layer.bias = nn.Parameter(torch.randn(40), requires_grad=False)


def drop_bias(layer):
    layer.bias = None


def move_bias(layer):
    layer.bias.data = torch.randn(40)


def swap_threshold(layer):
    layer.spon_threshold = torch.tensor([0.1])


def change_threshold(layer):
    layer.spon_threshold.fill_(0.1)


def swap_weight(layer):
    layer.weight = nn.Parameter(torch.randn(70, 40).t(), requires_grad=False)


def move_weight(layer):
    layer.weight.data = torch.randn(70, 40).t()


def change_weight(layer):
    layer.weight.mul_(2)


@pytest.mark.parametrize(
    "change",
    [swap_bias, drop_bias, move_bias, swap_threshold, change_threshold, swap_weight, move_weight, change_weight],
    ids=lambda change: change.__name__,
)
def test_a_changed_layer_computes_with_what_it_holds_now(operator_calls, change):
    layer, x = make_layer(), torch.randn(2, 70)
    before = layer(x)
    change(layer)
    assert torch.equal(layer(x), expected(layer, x)) and not torch.equal(layer(x), before)
    assert not operator_calls


def test_a_weight_that_lies_otherwise_at_the_same_address():
    layer, x = SparseLinear(48, 48), torch.randn(2, 48)
    layer.spon_threshold = torch.tensor([0.5])
    layer.arrange_for_kernels()
    with torch.no_grad():
        layer(x)
        layer.weight.data = layer.weight.data.t()
        kept = torch.where(x.abs() > layer.spon_threshold, x, 0)
        torch.testing.assert_close(layer(x), kept @ layer.weight.t() + layer.bias)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_a_cast_layer_follows(operator_calls, cast):
    layer, x = make_layer(), torch.randn(2, 70)
    layer(x)
    layer.to(cast)
    assert torch.equal(layer(x.to(cast)), expected(layer, x.to(cast))) and not operator_calls


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_settles_for_itself(copied):
    layer, x = make_layer(), torch.randn(2, 70)
    layer(x)
    other = copied(layer)
    other.weight.data.zero_()
    assert torch.equal(other(x), other.bias.expand(2, 40)) and not torch.equal(layer(x), other(x))


def trained(layer, x):
    layer.requires_grad_(True)
    y = layer(x)
    y.sum().backward()
    assert layer.weight.grad is not None
    return y


def with_input_gradient(layer, x):
    return layer(x.requires_grad_())


def many_rows(layer, x):
    return layer(x.repeat(5, 1))


@pytest.mark.parametrize("use", [trained, with_input_gradient, many_rows], ids=lambda use: use.__name__)
def test_the_operator_is_called_where_it_has_to_be(operator_calls, use):
    layer, x = make_layer(), torch.randn(2, 70)
    layer(x)
    near = torch.nn.functional.linear(torch.where(x.abs() > 0.5, x, 0), layer.weight, layer.bias)
    torch.testing.assert_close(use(layer, x).detach()[:2], near)
    assert operator_calls == [1]


def test_autocast_is_left_to_torch(operator_calls):
    layer, x = make_layer(), torch.randn(2, 70)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not operator_calls


@pytest.mark.parametrize(
    "x", [torch.randn(2, 71), torch.randn(2, 70).half(), torch.tensor(1.0)], ids=["long", "half", "0-d"]
)
def test_wrong_inputs_are_refused_as_ever(x):
    layer = make_layer()
    layer(torch.randn(1, 70))
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        layer(x)
