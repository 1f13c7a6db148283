# SPDX-License-Identifier: Apache-2.0
"""Layers that read one tensor: multiplied in one go, to the bits of each by itself, never from old data."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from spon_plugin.kernels.cpu import kernel, scaled
from spon_plugin.kernels.cpu.kernel import is_available
from spon_plugin.layers import shared_calls
from spon_plugin.layers.sparse_linear import SparseLinear, share_calls
from spon_plugin.layers.sparse_quantized import SparseQuantizedLinear
from tests.kernels.cpu.test_scaled_kernel import make
from tests.layers.test_sparse_quantized import Host

pytestmark = pytest.mark.skipif(not is_available(), reason="needs Numba and GNU's OpenMP")
SIZES = (40, 12, 6)
FORMATS = {
    "int8": ("int8", {}),
    "int8 zeros offsets": ("int8", {"zeros": True, "offsets": True}),
    "int4": ("int4", {}),
    "int4 zeros": ("int4", {"zeros": True, "scale": torch.bfloat16}),
    "fp8": ("fp8", {"scale": torch.float16}),
    "matrices": ("dense", {}),
}


class Block(nn.Module):
    """Three layers that read one tensor, and one that reads another."""

    def __init__(self, kind="int8", center=False, biases=(True, True, True), dtype=torch.float32):
        super().__init__()
        format, options = FORMATS[kind]
        for name, size, bias in zip(("q", "k", "v", "o"), (*SIZES, 48), (*biases, True), strict=True):
            layer = SparseLinear(48, size, dtype=dtype) if format == "dense" else SparseQuantizedLinear(Host(48, size))
            layer.spon_threshold = torch.tensor([0.5])
            layer.spon_center = torch.full((48,), 0.3) if center else None
            layer.bias = nn.Parameter(torch.randn(size), requires_grad=False) if bias else None
            if format == "dense":
                layer.arrange_for_kernels()
            else:
                layer.rows.weight = make(format, (48, size), group=16, **options).arranged()
            setattr(self, name, layer)

    @torch.no_grad()
    def forward(self, x):
        return [self.q(x), self.k(x), self.v(x), self.o(2 * x)]


@pytest.fixture
def calls(monkeypatch):
    """The outputs of each call of the kernel."""
    sizes = []

    def count(prepared):
        run = prepared.__call__

        def counted(self, *arguments):
            sizes.append(self.out_features if isinstance(self.out_features, int) else sum(self.out_features))
            return run(self, *arguments)

        monkeypatch.setattr(prepared, "__call__", counted)

    count(scaled.Prepared)
    count(kernel.Prepared)
    return sizes


def shared(block, x):
    """`block` once it has found out which layers read one tensor."""
    share_calls(block)
    for _ in range(3):
        block(x)
    return block


@pytest.mark.parametrize("center", [False, True], ids=["no centre", "centre"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (1, 8), (3,)], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_one_product_with_the_bits_of_three(calls, kind, rows, dtype, center):
    block, x = Block(kind, center, dtype=dtype), torch.randn(*rows, 48).to(dtype)
    expected = block(x)
    found = shared(block, x)
    calls.clear()
    y = found(x)
    assert calls == [sum(SIZES), 48]
    assert all(torch.equal(one, other) and one.is_contiguous() for one, other in zip(y, expected, strict=True))


@pytest.mark.parametrize("kind", ["int8", "matrices"])
@pytest.mark.parametrize("biases", [(False, True, False), (False, False, False)], ids=["one", "none"])
def test_layers_without_a_bias(calls, biases, kind):
    block, x = Block(kind, biases=biases), torch.randn(1, 48)
    expected = block(x)
    found = shared(block, x)
    calls.clear()
    assert all(torch.equal(one, other) for one, other in zip(found(x), expected, strict=True))
    assert calls == [sum(SIZES), 48]


def other_threshold(block):
    block.k.spon_threshold = torch.tensor([0.7])


def other_center(block):
    block.v.spon_center = torch.full((48,), 0.1)


def other_format(block):
    block.k.rows.weight = make("int4", (48, 12), group=16).arranged()


def other_groups(block):
    block.k.rows.weight = make("int8", (48, 12), group=48).arranged()


def other_bias(block):
    block.k.bias = nn.Parameter(block.k.bias.double(), requires_grad=False)


@pytest.mark.parametrize(
    "kind, change",
    [
        *(("int8", change) for change in (other_threshold, other_center, other_format, other_groups, other_bias)),
        *(("matrices", change) for change in (other_threshold, other_center)),
    ],
)
def test_layers_that_differ_are_not_joined(calls, kind, change):
    block, x = Block(kind), torch.randn(1, 48)
    change(block)
    expected = block(x)
    found = shared(block, x)
    calls.clear()
    assert all(torch.equal(one, other) for one, other in zip(found(x), expected, strict=True))
    assert calls[:3] == list(SIZES)


def other_layout(block):
    block.k.weight.data = block.k.weight.data.contiguous()


def test_a_matrix_that_lies_otherwise_is_left_alone(calls):
    block, x = Block("matrices"), torch.randn(1, 48)
    other_layout(block)
    expected = block(x)
    found = shared(block, x)
    calls.clear()
    assert all(torch.equal(one, other) for one, other in zip(found(x), expected, strict=True))
    assert calls == [40, 6, 48]  # k masks, and multiplies densely


def write_bias(block, _x):
    block.k.bias.add_(1)


def put_bias_data(block, _x):
    block.k.bias.data = block.k.bias + 1


def put_bias(block, _x):
    block.k.bias = nn.Parameter(block.k.bias + 1, requires_grad=False)


def write_threshold(block, _x):
    block.k.spon_threshold.fill_(5.0)


def put_threshold(block, _x):
    block.k.spon_threshold = torch.tensor([5.0])


def put_weight(block, _x):
    if isinstance(block.k, SparseLinear):
        block.k.weight = nn.Parameter(block.k.weight * 2)
    else:
        block.k.rows.weight = make("int8", (48, 12), group=48).arranged()


def put_weight_data(block, _x):
    if isinstance(block.k, SparseLinear):
        block.k.weight.data = block.k.weight.data * 2


def write_weight(block, _x):
    if isinstance(block.k, SparseLinear):
        block.k.weight.mul_(2)


def write_input(_block, x):
    x.mul_(3)


CHANGES = [write_bias, put_bias_data, put_bias, write_threshold, put_threshold, put_weight, write_input]


@pytest.mark.parametrize("kind", ["int8", "matrices"])
@pytest.mark.parametrize("change", [*CHANGES, put_weight_data, write_weight])
def test_a_change_after_the_first_call_counts(change, kind):
    block, x = Block(kind), torch.randn(1, 48)
    shared(block, x)
    with torch.no_grad():
        block.q(x)  # makes the outputs of all three
        change(block, x)
        y = block.k(x)
        alone = copy.deepcopy(block.k)
        alone.shared = None
        assert torch.equal(y, alone(x))
        for name in ("q", "k", "v"):  # and the next time round
            alone = copy.deepcopy(getattr(block, name))
            alone.shared = None
            assert torch.equal(getattr(block, name)(x), alone(x))


def test_exactness_may_be_asked_for_later():
    block, x = Block("int4"), torch.randn(1, 48)
    shared(block, x)
    for layer in block.children():
        layer.exact = True
    alone = copy.deepcopy(block)
    for layer in alone.children():
        layer.shared = None
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(block(x), alone(x), strict=True))


def test_a_thread_that_comes_while_layers_are_joined(monkeypatch):
    block, x = Block(), torch.randn(1, 48)
    expected, joined, seen = block(x), shared_calls._joined, []
    share_calls(block)

    def meanwhile(layers, like):
        before = list(layers)
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(block.v, x).result())  # of the tensor that those of `layers` were called with
        assert layers == before
        return joined(layers, like)

    monkeypatch.setattr(shared_calls, "_joined", meanwhile)
    with torch.no_grad():
        for layer, other in ((block.q, x), (block.k, x), (block.o, 2 * x)):
            layer(other)
        monkeypatch.undo()
        assert seen and all(torch.equal(y, expected[2]) for y in seen)
        for _ in range(3):
            assert all(torch.equal(one, other) for one, other in zip(block(x), expected, strict=True))


@pytest.mark.parametrize("kind", ["int8", "matrices"])
def test_layers_made_in_inference_mode_are_left_alone(kind):
    x = torch.randn(1, 48)
    with torch.inference_mode():
        block = Block(kind)
    expected = block(x)
    assert all(torch.equal(one, other) for one, other in zip(shared(block, x)(x), expected, strict=True))


def test_an_output_is_handed_out_once(calls):
    block, x = Block(), torch.randn(1, 48)
    shared(block, x)
    with torch.no_grad():
        block.q(x)
        first = block.k(x).clone()
        block.k(x).zero_()
        assert torch.equal(block.k(x), first)
        calls.clear()
        block.v(x)
    assert not calls


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))], ids=["copy", "pickle"]
)
def test_copies_find_out_anew(copied):
    block, x = Block(), torch.randn(1, 48)
    expected = shared(block, x)(x)
    other = copied(block)
    assert other.q.shared is other.k.shared is not block.q.shared
    with torch.no_grad():
        other.k.bias.zero_()
    for _ in range(3):
        y = other(x)
    assert torch.equal(y[0], expected[0]) and not torch.equal(y[1], expected[1])
    assert all(torch.equal(one, two) for one, two in zip(block(x), expected, strict=True))


@pytest.mark.parametrize("kind", ["int8", "matrices"])
@pytest.mark.parametrize("case", ["many rows", "autocast", "inference", "a gradient", "no rows"])
def test_what_each_layer_computes_by_itself(calls, case, kind):
    block, x = Block(kind), torch.randn(1, 48)
    shared(block, x)
    calls.clear()
    if case == "a gradient":
        x = x.requires_grad_()
        (block.q(x) + 0).sum().backward()
        assert x.grad is not None
    elif case == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            block(x)
    elif case == "inference":
        with torch.inference_mode():
            block(torch.randn(1, 48))
    else:
        block(torch.randn(9 if case == "many rows" else 0, 48))
    assert sum(SIZES) not in calls


@pytest.mark.parametrize("kind", ["int8", "matrices"])
def test_layers_that_are_offloaded_between_calls_are_left_alone(calls, kind):
    block, x = Block(kind), torch.randn(1, 48)
    expected = block(x)
    share_calls(block)
    for layer in block.children():  # as accelerate's hooks do
        held = {name: layer._buffers[name] for name in ("spon_threshold",)}
        layer.register_forward_pre_hook(lambda layer, _args, held=held: layer._buffers.update(held))
        layer.register_forward_hook(
            lambda layer, *_: layer._buffers.update(spon_threshold=layer.spon_threshold.to("meta"))
        )
    for _ in range(3):
        calls.clear()
        assert all(torch.equal(one, other) for one, other in zip(block(x), expected, strict=True))
    assert calls == [*SIZES, 48]


def test_weights_that_are_trained_keep_their_gradient():
    block, x = Block("matrices"), torch.randn(1, 48)
    shared(block, x)
    block.k.weight.requires_grad_()
    block.q(x), block.k(x).sum().backward()
    assert block.k.weight.grad is not None


@pytest.mark.parametrize("kind", ["int8", "matrices"])
def test_a_model_that_is_cast_is_joined_anew(calls, kind):
    block, x = Block(kind), torch.randn(1, 48)
    shared(block, x)
    block.bfloat16()
    x = x.bfloat16()
    alone = copy.deepcopy(block)
    for layer in alone.children():
        layer.shared = None
    expected = alone(x)
    for _ in range(4):
        calls.clear()
        assert all(torch.equal(one, other) for one, other in zip(block(x), expected, strict=True))
    assert calls == [sum(SIZES), 48]
