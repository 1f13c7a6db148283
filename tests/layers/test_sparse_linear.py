# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from spon_plugin import Mask, SparseConv1D, SparseLinear, SponError, fold_alpha
from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.kernels.few_rows import CPU_ROWS
from spon_plugin.layers.sparse_linear import sparse_like
from spon_plugin.weights.linears import is_linear, linear_features


def sparse_linear(bias=True, dtype=torch.float32) -> SparseLinear:
    torch.manual_seed(0)
    layer = SparseLinear(7, 5, bias=bias, dtype=dtype)
    layer.spon_threshold.fill_(0.5)
    return layer


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_sparse_linear_is_a_linear_on_masked_input(bias):
    layer, x = sparse_linear(bias), torch.randn(2, 3, 7)
    masked = torch.where(x.abs() > 0.5, x, 0)
    assert torch.equal(layer(x), nn.functional.linear(masked, layer.weight, layer.bias))


def arranged(plain: SparseLinear) -> SparseLinear:
    layer = copy.deepcopy(plain)
    layer.arrange_for_kernels()
    assert layer.weight.t().is_contiguous() and not plain.weight.t().is_contiguous()
    return layer


@pytest.mark.parametrize("rows", [1, 8, 20])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arranged_layer_computes_the_same_through_the_operator(dtype, bias, rows, monkeypatch):
    import spon_plugin.layers.sparse_linear as layers

    calls, operator = [], layers.sparse_linear
    monkeypatch.setattr(layers, "sparse_linear", lambda *args: calls.append(1) or operator(*args))
    plain = sparse_linear(bias, dtype)
    layer, x = arranged(plain), torch.randn(rows, 7).to(dtype)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x), **near)
    short = rows <= CPU_ROWS and cpu.is_available()  # few rows go to the kernel straight; see test_layer_call.py
    assert len(calls) == (0 if short else 1), "the arranged layer, and it alone"
    results = []
    for module in (plain, layer):
        given = x.clone().requires_grad_()
        module(given).float().square().sum().backward()
        results.append([given.grad, *(parameter.grad for parameter in module.parameters())])
    torch.testing.assert_close(*results, **near)


def with_vectors(layer, center: bool = True):
    """The layer with a threshold per channel and, if wanted, a centre."""
    torch.manual_seed(1)
    layer.spon_threshold = torch.rand(7)
    layer.spon_center = torch.randn(7) if center else None
    return layer


@pytest.mark.parametrize("rows", [1, CPU_ROWS, 20])
@pytest.mark.parametrize("center", [False, True], ids=["vector", "vector-and-centre"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [sparse_linear, lambda **k: SparseConv1D(5, 7, **k)], ids=["linear", "conv1d"])
def test_thresholds_per_channel_and_a_centre_compute_the_formula(make, dtype, center, rows):
    layer = with_vectors(make(dtype=dtype), center)
    layer.arrange_for_kernels()
    x = torch.randn(rows, 7).to(dtype)
    taken_off = layer.spon_center if center else torch.zeros(7)
    kept = (x - taken_off).to(dtype)
    expected = torch.where(kept.abs() > layer.spon_threshold, kept, 0) @ layer.weight_t + layer.bias
    exact = {"rtol": 1e-5, "atol": 1e-6} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 2e-2}
    assert layer.weight_t.is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, **exact)
    given = x.clone().requires_grad_()
    layer(given).float().sum().backward()
    gradient = torch.where(kept.abs() > layer.spon_threshold, layer.weight_t.float().sum(-1), 0)
    torch.testing.assert_close(given.grad.float(), gradient, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("center", [False, True], ids=["vector", "vector-and-centre"])
def test_a_layer_with_vectors_takes_the_kernel(center, monkeypatch):
    layer, x = with_vectors(arranged(sparse_linear()), center), torch.randn(2, 7)
    with torch.no_grad():
        expected = layer(x)
        if cpu.is_available():
            for place, name in ((nn.functional, "linear"), (torch, "mm"), (torch, "addmm")):
                monkeypatch.setattr(place, name, None)
        assert torch.equal(layer(x), expected)
        layer.spon_threshold = torch.zeros(7)  # another mask, from the next call on
        assert not torch.equal(layer(x), expected)


@pytest.mark.parametrize("dense_bias", [False, True], ids=["no-bias", "bias"])
def test_dense_tokens_of_a_layer_with_a_centre_are_those_of_the_dense_layer(dense_bias):
    class Tokens:
        def rows(self, x):
            return torch.tensor([True, False, True])

    layer, x = with_vectors(sparse_linear()), torch.randn(3, 7)
    dense = nn.Linear(7, 5, bias=dense_bias)
    dense.weight = layer.weight
    layer.keep_dense_bias(dense.bias)
    masked = layer(x)
    layer.tokens = Tokens()
    torch.testing.assert_close(layer(x), torch.stack([dense(x)[0], masked[1], dense(x)[2]]), rtol=1e-5, atol=1e-6)


def test_compiled_layer_with_vectors_agrees():
    layer, x = with_vectors(arranged(sparse_linear())), torch.randn(2, 7)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_vectors_survive_casts_copies_and_state_dicts():
    layer = with_vectors(sparse_linear())
    threshold, center = layer.spon_threshold.clone(), layer.spon_center.clone()
    other = with_vectors(sparse_linear())
    other.spon_center = torch.zeros(7)
    other.load_state_dict(layer.state_dict())
    for model in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half(), layer.bfloat16()):
        assert torch.equal(model.spon_threshold, threshold) and torch.equal(model.spon_center, center)
    assert "spon_center" not in sparse_linear().state_dict()


def test_state_dict_of_an_arranged_layer_is_that_of_a_linear(tmp_path):
    plain = sparse_linear()
    layer = arranged(plain)
    state = layer.state_dict()
    assert all(value.is_contiguous() and torch.equal(value, plain.state_dict()[name]) for name, value in state.items())
    save_file(state, tmp_path / "layer.safetensors")
    other = arranged(sparse_linear())
    other.weight.data.zero_()
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other.weight, plain.weight) and other.weight.t().is_contiguous()


def test_arrangement_survives_casts_and_copies():
    layer = arranged(sparse_linear())
    layer.arrange_for_kernels()
    casts = (copy.deepcopy(layer).half(), copy.deepcopy(layer).to(torch.bfloat16), copy.deepcopy(layer).double())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), *casts):
        assert other.weight.t().is_contiguous() and other.weight.shape == (5, 7)


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_with_nothing_to_skip_is_a_linear_to_the_last_bit(dtype, rows):
    linear, layer = nn.Linear(64, 128, dtype=dtype), SparseLinear(64, 128, dtype=dtype)
    layer.load_state_dict(linear.state_dict(), strict=False)
    layer.arrange_for_kernels()
    x = torch.randn(rows, 64, dtype=dtype)
    assert layer.weight.is_contiguous() and torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_treats_the_arranged_layer_like_the_plain_one(dtype):
    plain, x = sparse_linear(dtype=dtype), torch.randn(2, 7)
    layer = arranged(plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == plain(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x), plain(x))


def test_conv1d_needs_no_arrangement(monkeypatch):
    import spon_plugin.layers.sparse_linear as layers

    calls, operator = [], layers.sparse_linear
    monkeypatch.setattr(layers, "sparse_linear", lambda *args: calls.append(1) or operator(*args))
    conv = SparseConv1D(5, 7)
    weight, x = conv.weight.data_ptr(), torch.randn(2, 7)
    conv.arrange_for_kernels()
    torch.testing.assert_close(conv(x), x.masked_fill(x == 0, 0) @ conv.weight + conv.bias)
    assert conv.weight.data_ptr() == weight and calls == [1]


def test_sparse_conv1d_agrees_with_sparse_linear():
    layer, x = sparse_linear(), torch.randn(4, 7)
    conv = SparseConv1D(nf=5, nx=7)
    conv.load_state_dict({**layer.state_dict(), "weight": layer.weight.t()})
    torch.testing.assert_close(conv(x), layer(x))


@pytest.mark.parametrize("make", [sparse_linear, lambda: SparseConv1D(5, 7)], ids=["linear", "conv1d"])
def test_the_threshold_stays_float32_when_the_model_is_cast(make):
    layer = make()
    layer.spon_threshold.fill_(0.1)
    for model in (layer.half(), layer.to(torch.bfloat16), copy.deepcopy(layer)):
        assert model.weight.dtype != torch.float32
        assert model.spon_threshold.dtype == torch.float32
        assert model.spon_threshold.item() == torch.tensor(0.1).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_fold_is_w_alpha_in_float32(kind, dtype):
    torch.manual_seed(0)
    layer = (nn.Linear(64, 48) if kind == "linear" else Conv1D(48, 64)).to(dtype)
    alpha = torch.randn(64)
    matrix = layer.weight if kind == "linear" else layer.weight.t()
    bias = fold_alpha(layer, alpha)
    assert bias.dtype == torch.float32
    torch.testing.assert_close(bias.double(), matrix.double() @ alpha.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_constant_is_w_times_centre_and_alpha(dtype):
    layer, alpha, center = nn.Linear(64, 48, dtype=dtype), torch.randn(64), torch.randn(64)
    weight = layer.weight.double()
    for a, c in ((alpha, center), (alpha, None), (None, center)):
        total = sum(part.double() for part in (a, c) if part is not None)
        constant = Mask(torch.zeros(1), c, a).constant
        torch.testing.assert_close(fold_alpha(layer, constant).double(), weight @ total, rtol=1e-5, atol=1e-5)
    assert Mask(torch.zeros(1)).constant is None


class Packed(nn.Linear):
    """A linear whose weight says nothing: two levels and a scale, as a quantized layer's might."""

    def __init__(self):
        super().__init__(8, 4)
        self.real = self.weight.detach().sign() * 0.1
        self.weight = nn.Parameter((self.real > 0).to(torch.uint8), requires_grad=False)

    def forward(self, x):
        return x @ self.real.t().to(x.dtype) + self.bias.to(x.dtype)


def test_the_fold_of_a_packed_weight_is_what_the_layer_computes_without_its_bias():
    layer, alpha = Packed(), torch.randn(8)
    torch.testing.assert_close(fold_alpha(layer, alpha), layer.real @ alpha)


def test_the_fold_refuses_an_alpha_of_another_length():
    with pytest.raises(SponError, match=r"q_proj: alpha: got \(8,\), expected shape \(7,\)"):
        fold_alpha(nn.Linear(7, 5), torch.zeros(8), "q_proj")


def test_what_counts_as_a_linear():
    assert is_linear(nn.Linear(2, 3)) and is_linear(Conv1D(3, 2)) and is_linear(sparse_linear())
    assert not is_linear(nn.Embedding(2, 3)) and not is_linear(nn.Conv1d(2, 3, 1))
    assert linear_features(Conv1D(3, 2)) == linear_features(nn.Linear(2, 3)) == (2, 3)
    with pytest.raises(SponError, match="embed: got 'Embedding', expected a linear layer"):
        linear_features(nn.Embedding(2, 3), "embed")


@pytest.mark.parametrize("device", [None, "meta"], ids=["where it is", "meta"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("linear", "kind"),
    [(nn.Linear(7, 5), SparseLinear), (nn.Linear(7, 5, bias=False), SparseLinear), (Conv1D(5, 7), SparseConv1D)],
    ids=["linear", "no-bias", "conv1d"],
)
def test_a_sparse_layer_in_the_place_of_a_linear(linear, kind, training, device):
    linear = copy.deepcopy(linear).to(torch.bfloat16).train(training)
    layer = sparse_like(linear, device)
    assert type(layer) is kind and linear_features(layer) == (7, 5) and layer.training == training
    assert layer.weight.shape == linear.weight.shape and layer.weight.data_ptr() != linear.weight.data_ptr()
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16 and layer.spon_threshold.dtype == torch.float32
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {device or "cpu"}
