# SPDX-License-Identifier: Apache-2.0
"""Dense products on a weight that lies ``[in, out]``, on CPUs that emulate 16-bit products and on others."""

import threading

import pytest
import torch
from torch.nn import functional as F

from spon_plugin import SparseLinear, machine
from spon_plugin.kernels import gemm, reference, sparse_linear
from spon_plugin.kernels.cpu import kernel as cpu

HALVES = [torch.bfloat16, torch.float16]
SHARDS = {"one": (None, (1,)), "channels": (None, (70,)), "shards": ([40, 21], (2,)), "both": ([40, 21], (2, 70))}


@pytest.fixture(params=["emulated", "native"])
def native(request, monkeypatch) -> bool:
    dtypes = frozenset(HALVES if request.param == "native" else ())
    monkeypatch.setattr(machine, "native_dtypes", lambda: dtypes)
    return request.param == "native"


@pytest.fixture
def panels(monkeypatch) -> list[int]:
    """How many rows of x each product by panels had; with panels of a few rows, so that several make a weight.

    They are torch's, as where our own kernel (`cpu.panels`) does not run.
    """
    rows, by_panels = [], gemm._by_panels
    monkeypatch.setattr(gemm.panels, "why_not", lambda x, weight: "not here")
    monkeypatch.setattr(gemm, "_PANEL", 1000)
    monkeypatch.setattr(gemm, "_by_panels", lambda x, *rest: (rows.append(len(x)), by_panels(x, *rest))[1])
    return rows


def tensors(dtype, rows, out=61):
    torch.manual_seed(0)
    return torch.randn(rows, 70).to(dtype), torch.randn(70, out).to(dtype), torch.randn(out)


def within_one_rounding(found, exact):
    """Sums in float32, rounded once: nowhere further than half a unit in the last place and what float32 adds."""
    assert found.dtype in HALVES
    bound = exact.abs() * torch.finfo(found.dtype).eps / 2 + 1e-4
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("rows", [1, 9, 33, 300])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dense_linear(native, panels, dtype, rows, bias):
    x, weight_t, b = tensors(dtype, rows)
    b = b.to(dtype) if bias else None
    y = gemm.dense_linear(x.view(rows, 1, 70), weight_t, b).view(rows, 61)
    assert bool(panels) != native
    if native:
        assert torch.equal(y, F.linear(x, weight_t.t(), b))
    else:
        within_one_rounding(y, x.double() @ weight_t.double() + (0 if b is None else b.double()))


@pytest.mark.parametrize("bias", ["none", "float32", "own"])
@pytest.mark.parametrize("kind", SHARDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_masked_products_by_panels(native, panels, dtype, kind, bias):
    x, weight_t, b = tensors(dtype, 20)
    sizes, shape = SHARDS[kind]
    threshold = 0.3 + 0.5 * torch.rand(shape)
    b = {"none": None, "float32": b, "own": b.to(dtype)}[bias]
    y = sparse_linear(x, weight_t, threshold, b, shard_sizes=sizes)
    assert panels == ([] if native else [20] * len(sizes or [1]))
    if not native:
        wide = x.double(), weight_t.double(), threshold, None if b is None else b.double()
        within_one_rounding(y, reference.sparse_linear(*wide, shard_sizes=sizes))


@pytest.mark.parametrize("case", ["float32", "gradient", "autocast", "torch's own layout", "another dtype"])
def test_what_has_to_see_a_product_sees_it(monkeypatch, panels, case):
    monkeypatch.setattr(machine, "native_dtypes", frozenset)
    x, weight_t, _ = tensors(torch.float32 if case == "float32" else torch.bfloat16, 9)
    if case == "gradient":
        x.requires_grad_()
    if case == "torch's own layout":
        weight_t = weight_t.t().contiguous().t()
    if case == "another dtype":
        with pytest.raises(RuntimeError, match="dtype"):
            gemm.dense_linear(x.float(), weight_t)
        return
    with torch.autocast("cpu", enabled=case == "autocast"):
        y = gemm.dense_linear(x, weight_t)
        assert torch.equal(y, F.linear(x, weight_t.t())) and not panels
    if case == "gradient":
        y.sum().backward()
        assert x.grad is not None
        with torch.no_grad():
            gemm.dense_linear(x, weight_t)
        assert panels == [9]


@pytest.mark.parametrize("shape", [(0, 70, 61), (9, 0, 61), (9, 70, 0)], ids=["no-rows", "no-inputs", "no-outputs"])
def test_nothing_to_multiply(monkeypatch, shape):
    monkeypatch.setattr(machine, "native_dtypes", frozenset)
    rows, inputs, outputs = shape
    y = gemm.dense_linear(torch.ones(rows, inputs).bfloat16(), torch.ones(inputs, outputs).bfloat16())
    assert y.shape == (rows, outputs) and (y == inputs).all()


def test_a_panel_is_held_by_its_thread_and_survives_inference_mode(monkeypatch):
    monkeypatch.setattr(machine, "native_dtypes", frozenset)
    monkeypatch.setattr(gemm.panels, "why_not", lambda x, weight: "not here")
    monkeypatch.setattr(gemm, "_local", threading.local())
    x, weight_t, _ = tensors(torch.bfloat16, 9)
    with torch.inference_mode():
        expected = gemm.dense_linear(x, weight_t)
    held = gemm._local.panel
    assert torch.equal(gemm.dense_linear(x, weight_t), expected) and gemm._local.panel is held
    others: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: (gemm.dense_linear(x, weight_t), others.append(gemm._local.panel)))
    thread.start()
    thread.join()
    assert others[0].data_ptr() != held.data_ptr()


def test_dense_tokens_of_a_merged_layer_go_by_panels(native, panels):
    layer = SparseLinear(70, 61, dtype=torch.bfloat16).requires_grad_(False)
    layer.spon_threshold.fill_(0.5)
    layer.keep_dense_bias()
    layer.arrange_for_kernels()
    layer.tokens = type("Tokens", (), {"rows": staticmethod(lambda x: torch.tensor([True] + [False] * 8))})()
    layer(torch.randn(9, 70).bfloat16())
    assert panels == ([] if native else [9])


@pytest.mark.skipif(not cpu.is_available(), reason="needs Numba and GNU's OpenMP")
def test_a_merged_layer_says_what_it_computes_in(native):
    layer = SparseLinear(70, 61, dtype=torch.bfloat16)
    layer.spon_threshold.fill_(0.5)
    layer.arrange_for_kernels()
    said = "spon::sparse_linear (cpu), masked dense for many rows"
    assert layer.kernel == said + ("" if native else " in float32, as this CPU emulates its dtype")
    assert layer.float().kernel == said
