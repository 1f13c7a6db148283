# SPDX-License-Identifier: Apache-2.0
"""The operator: registration, gradients, compilation and errors, on a CPU."""

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from spon_plugin import SparseLinear, SponError
from spon_plugin.kernels import op, reference, sparse_linear
from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.kernels.cpu import known_calls
from spon_plugin.kernels.few_rows import CPU_ROWS

OPERATOR = torch.ops.spon.sparse_linear.default
SHARDS = {"one": (None, (1,)), "channels": (None, (12,)), "shards": ([4, 6], (2,)), "both": ([4, 6], (2, 12))}


def arguments(dtype: torch.dtype = torch.float32, kind: str = "one", bias: bool = True, rows: int = 3) -> list[Any]:
    torch.manual_seed(0)
    sizes, shape = SHARDS[kind]
    x, weight_t = torch.randn(rows, 12).to(dtype), torch.randn(12, 10).to(dtype)
    return [x, weight_t, 0.3 + 0.5 * torch.rand(shape), torch.randn(10).to(dtype) if bias else None, sizes]


def call(function: Callable[..., Tensor], given: list[Any]) -> Tensor:
    *tensors, sizes = given
    return function(*tensors, shard_sizes=sizes)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("kind", ["one", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype, kind: str, bias: bool, gradients: bool) -> None:
    given = arguments(dtype, kind, bias)
    for value in (given[0], given[1], given[3]) if gradients else ():
        if value is not None:
            value.requires_grad_()
    # In 16 bits the compiled backward adds up in another order.
    options = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.library.opcheck(OPERATOR, tuple(given), **options)


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("kind", SHARDS)
def test_gradients_are_those_of_the_reference(kind: str, bias: bool, rows: int) -> None:
    gradients = []
    for function in (sparse_linear, reference.sparse_linear):
        given = arguments(kind=kind, bias=bias, rows=rows)
        leaves = [value.requires_grad_() for value in (given[0], given[1], given[3]) if value is not None]
        gradients.append(torch.autograd.grad(call(function, given).square().sum(), leaves))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", SHARDS)
def test_gradcheck(kind: str) -> None:
    given = arguments(torch.float64, kind)
    leaves = tuple(given[i].requires_grad_() for i in (0, 1, 3))
    assert torch.autograd.gradcheck(lambda x, w, b: call(sparse_linear, [x, w, given[2], b, given[4]]), leaves)


@pytest.mark.parametrize("leaf", [0, 1], ids=["x", "weight_t"])
def test_a_gradient_needs_no_bias_argument(leaf: int) -> None:
    x, weight_t, threshold, _, _ = given = arguments()
    given[leaf].requires_grad_()
    sparse_linear(x, weight_t, threshold).sum().backward()
    assert given[leaf].grad is not None


def test_an_infinite_gradient_does_not_reach_masked_entries() -> None:
    x, weight_t, threshold, _, _ = arguments()
    x.requires_grad_()
    y = sparse_linear(x, weight_t.abs(), threshold)
    y.backward(torch.full_like(y, float("inf")))
    kept = x.abs() > threshold
    assert x.grad is not None and (x.grad[~kept] == 0).all() and x.grad[kept].isinf().all()


def test_compiles_whole_and_follows_batch_and_threshold() -> None:
    _, weight_t, threshold, bias, _ = arguments()
    torch._dynamo.reset()
    layer = SparseLinear(12, 10)
    layer.spon_threshold.fill_(0.5)
    layer.arrange_for_kernels()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def function(x: Tensor, tau: Tensor) -> Tensor:
        return sparse_linear(x * 2, weight_t, tau, bias).relu()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    compiled_layer = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (2, 3, CPU_ROWS, CPU_ROWS + 1, 40):
            x = torch.randn(rows, 12)
            for tau in (threshold, threshold + 0.4):
                torch.testing.assert_close(compiled(x, tau), function(x, tau))
                layer.spon_threshold.copy_(tau)
                torch.testing.assert_close(compiled_layer(x), layer(x))
    assert len(graphs) == 1, "crossing from the kernel to the GEMM is the operator's business, not the compiler's"
    assert [node.target for node in graphs[0].graph.nodes].count(torch.ops.spon.sparse_linear) == 1


M = torch.zeros
WRONG = {
    "weight_t: dimensions": ({1: M(12)}, "weight_t: got .*a contiguous matrix"),
    "weight_t: strides": ({1: M(10, 12).t()}, "weight_t: got .*a contiguous matrix"),
    "x: scalar": ({0: M(())}, "x: got"),
    "x: width": ({0: M(2, 11)}, "x: got .*weight_t's in_features"),
    "x: dtype": ({0: M(2, 12, dtype=torch.bfloat16)}, "x: got torch.bfloat16"),
    "x: device": ({0: M(2, 12, device="meta")}, "x: got device.*meta"),
    "bias: shape": ({3: M(9)}, "bias: got"),
    "bias: dimensions": ({3: M(1, 10)}, "bias: got"),
    "bias: dtype": ({3: M(10, dtype=torch.float16)}, "bias: got torch.float16"),
    "bias: device": ({3: M(10, device="meta")}, "bias: got device.*meta"),
    "threshold: dtype": ({2: M(1, dtype=torch.float64)}, "threshold: got torch.float64"),
    "threshold: shape": ({2: M(5)}, "threshold: got"),
    "threshold: scalar": ({2: M(())}, "threshold: got"),
    "threshold: device": ({2: M(1, device="meta")}, "threshold: got device.*meta"),
    "shard_sizes: sum": ({4: [4, 5]}, "shard_sizes: got .*4, 5"),
    "shard_sizes: zero": ({4: [0, 10]}, "shard_sizes: got .*0, 10"),
    "shard_sizes: none": ({4: []}, "shard_sizes: got"),
}


@pytest.mark.skipif(not cpu.is_available(), reason="needs Numba and GNU's OpenMP")
def test_a_known_call_is_that_of_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call skips the checks; with anything else in the place of an argument it is another call."""
    x, weight_t, tau, bias, _ = arguments()
    narrow, few = weight_t[:, 5:].contiguous(), bias[5:].clone()
    checked: list[Tensor] = []
    check = op.check_arguments
    monkeypatch.setattr(op, "check_arguments", lambda *given: (checked.append(given[0]), check(*given)))

    def agree(*given: Any) -> None:
        torch.testing.assert_close(call(sparse_linear, list(given)), call(reference.sparse_linear, list(given)))

    agree(x, weight_t, tau, bias, None)
    agree(torch.randn(2, 12), weight_t, tau, bias, None)
    tau.fill_(0.9)
    agree(x, weight_t, tau, bias, None)
    assert len(checked) == 1
    two = torch.tensor([0.3, 0.9])
    for changed in (
        [x, weight_t, torch.full((12,), 0.3), bias, None],
        [x, weight_t, tau, None, None],
        [x, weight_t, two, bias, [4, 6]],
        [x, weight_t, two, bias, [6, 4]],
        [x, narrow, tau, few, None],
        [x, weight_t[:6].view(12, 5), tau, few, None],
    ):
        agree(*changed)
        agree(*changed)
    assert len(checked) == 7
    for rows in (CPU_ROWS + 1, 0):
        agree(torch.randn(rows, 12), weight_t, tau, bias, None)
    with pytest.raises(SponError, match="dtype"):
        sparse_linear(x.double(), weight_t, tau, bias)


@pytest.mark.skipif(not cpu.is_available(), reason="needs Numba and GNU's OpenMP")
def test_known_calls_keep_nothing_alive_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_calls, "_MOST", len(known_calls._matrices) + 2)
    held: list[weakref.ref[Tensor]] = []
    for _ in range(5):
        given = arguments()
        sparse_linear(*given[:4])
        held += [weakref.ref(part) for part in given[1:4]]
    assert len(known_calls._matrices) <= known_calls._MOST
    given = None
    assert not [part for part in held if part() is not None]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("rows", [1, 9], ids=["kernel", "gemm"])
def test_wrong_arguments_are_named(wrong: str, rows: int) -> None:
    changes, message = WRONG[wrong]
    given = arguments(rows=rows)
    for position, value in changes.items():
        given[position] = value
    with pytest.raises(SponError, match=f"^{message}"):
        call(sparse_linear, given)


@pytest.mark.parametrize("rows", [1, CPU_ROWS], ids="rows={}".format)
def test_implementation(rows: int) -> None:
    few = "cpu" if cpu.is_available() else "gemm"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert op.implementation(torch.zeros(rows, 12, dtype=dtype)) == few
    assert op.implementation(torch.zeros(12)) == op.implementation(torch.zeros(2, 4, 12)) == few
    for x in (
        torch.zeros(CPU_ROWS + 1, 12),
        torch.zeros(0, 12),
        torch.zeros(rows, 0),
        torch.zeros(rows, 12).double(),
    ):
        assert op.implementation(x) == "gemm"
    assert op.implementation(torch.zeros(rows, 12, device="meta")) == "gemm"


def test_who_has_to_see_the_call_sees_it() -> None:
    x, weight_t, threshold, bias, _ = given = arguments()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) for value in (x, weight_t, threshold, bias)]
        assert sparse_linear(*fakes).shape == (3, 10)
    graph = make_fx(lambda x: sparse_linear(x, *given[1:4]))(x)
    assert OPERATOR in [node.target for node in graph.graph.nodes]
    traced = torch.jit.trace(lambda x: sparse_linear(x, *given[1:4]), (x,))
    torch.testing.assert_close(traced(2 * x), sparse_linear(2 * x, *given[1:4]))
    mapped = torch.func.vmap(lambda row: sparse_linear(row, *given[1:4]))(x)
    torch.testing.assert_close(mapped, sparse_linear(*given[:4]))

    class Tagged(Tensor):
        seen: ClassVar[list[Any]] = []

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    sparse_linear(x.as_subclass(Tagged), weight_t, threshold, bias)
    assert any("sparse_linear" in str(function) for function in Tagged.seen)
