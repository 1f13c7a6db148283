# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel for many rows: every format against float64, threads, rows beside each other, and when it runs."""

from dataclasses import replace

import pytest
import torch

from spon_plugin import machine
from spon_plugin.kernels import decoded, gemm, sparse_linear, table
from spon_plugin.kernels.cpu import panels
from spon_plugin.kernels.cpu.kernel import is_available
from spon_plugin.masking import sparsify

processor = pytest.importorskip("spon_plugin.kernels.cpu.processor", exc_type=ImportError)
pytestmark = pytest.mark.skipif(not is_available(), reason="needs Numba and GNU's OpenMP")
from tests.kernels.cpu.test_scaled_kernel import check, make, truth  # noqa: E402 (needs Numba itself)

AVX2 = frozenset({"avx2", "fma"})
# Fewer than a block, blocks of 4, 5 and 6 rows, and more than the second cache holds.
ROWS = (1, 7, 9, 16, 200)
FORMATS = {
    "int8": {},
    "int8 zeros": {"zeros": True},
    "int4": {},
    "int4 zeros offsets": {"zeros": True, "offsets": True},
    "int4 act-order": {"act_order": True, "zeros": True},
    "fp8": {"scale": torch.bfloat16},
    "fp8 offsets": {"offsets": True, "scale": torch.float16},
}


@pytest.mark.parametrize("shape", [(300, 77), (1, 1), (128, 512), (257, 1042)], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", FORMATS)
def test_weights_with_scales(kind, rows, shape):
    weight, x = make(kind.split()[0], shape, **FORMATS[kind]), torch.randn(rows, shape[0])
    tau, bias = torch.rand(shape[0]), torch.randn(shape[1])
    check(panels.sparse_linear(x, weight, tau, bias), truth(x, weight, [tau], bias), 1e-6)
    check(panels.sparse_linear(x, weight, None), truth(x, weight, [torch.tensor([-1.0])]), 1e-6)


@pytest.mark.parametrize("kind", FORMATS)
def test_shards_and_a_part_of_a_weight(kind):
    whole, x, sizes = make(kind.split()[0], (256, 192), **FORMATS[kind]), torch.randn(11, 256), [40, 16, 9]
    part, taus = whole.shard(64, 129) if whole.unit == 1 else whole.shard(64, 192), torch.rand(3, 256)
    sizes[-1] += part.out_features - sum(sizes)
    check(panels.sparse_linear(x, part, taus, shard_sizes=sizes), truth(x, part, list(taus), None, sizes), 1e-6)


@pytest.mark.parametrize("dtype", machine.DTYPES.values(), ids=str)
@pytest.mark.parametrize("format", ["dense", "int8", "int4", "fp8"])
def test_bits_depend_on_neither_threads_nor_other_rows(format, dtype):
    weight = torch.randn(300, 1042).to(dtype) if format == "dense" else make(format, (300, 1042))
    x, tau, bias = torch.randn(40, 300).to(dtype), torch.tensor([0.5]), torch.randn(1042)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(panels.sparse_linear(x, weight, tau, bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
    for rows in (slice(0, 1), slice(3, 12), slice(17, 40)):
        assert torch.equal(panels.sparse_linear(x[rows], weight, tau, bias), found[0][rows])


def test_more_rows_than_one_go(monkeypatch):
    monkeypatch.setattr(panels, "ROWS", 16)
    monkeypatch.setattr(panels, "SUMS", 1)  # a panel at a time
    weight, x, tau = make("int4", (200, 1100), zeros=True), torch.randn(37, 200), torch.tensor([0.5])
    check(panels.sparse_linear(x, weight, tau), truth(x, weight, [tau]), 1e-6)


@pytest.mark.parametrize("lies", ["columns", "rows apart", "expanded", "three dimensions"])
def test_x_that_lies_otherwise(lies):
    weight, tau = torch.randn(70, 61), torch.tensor([0.3])
    x = {
        "columns": lambda: torch.randn(70, 12).t(),
        "rows apart": lambda: torch.randn(12, 99)[:, 7:77],
        "expanded": lambda: torch.randn(1, 70).expand(12, 70),
        "three dimensions": lambda: torch.randn(3, 4, 70).transpose(0, 1),
    }[lies]()
    y = panels.sparse_linear(x, weight, tau)
    assert y.shape == (*x.shape[:-1], 61)
    check(y, sparsify(x, tau).double() @ weight.double(), 1e-6)


@pytest.mark.parametrize("shape", [(0, 70, 61), (9, 0, 61), (9, 70, 0)], ids=["no rows", "no inputs", "no outputs"])
def test_nothing_to_multiply(shape):
    rows, inputs, outputs = shape
    bias = torch.ones(outputs)
    y = panels.sparse_linear(torch.ones(rows, inputs), torch.ones(inputs, outputs), torch.zeros(1), bias)
    assert y.shape == (rows, outputs) and (y == inputs + 1).all()


def test_nan_stays_in_its_row():
    x, weight = torch.zeros(10, 64), torch.randn(64, 40)
    x[3, 5] = torch.nan
    y = panels.sparse_linear(x, weight, torch.tensor([0.5]))
    assert y[3].isnan().all() and (y[[0, 1, 2, 4, 5, 6, 7, 8, 9]] == 0).all()


@pytest.fixture
def runs(monkeypatch):
    """The rows of each call of the kernel, on an AVX2 machine that emulates what is not float32."""
    monkeypatch.setattr(machine, "native_dtypes", frozenset)
    monkeypatch.setattr(processor, "features", lambda: AVX2)
    rows, run = [], panels.sparse_linear
    monkeypatch.setattr(
        panels, "sparse_linear", lambda x, *a, **k: (rows.append(x.shape[:-1].numel()), run(x, *a, **k))[1]
    )
    return rows


@pytest.mark.parametrize("dtype", machine.DTYPES.values(), ids=str)
@pytest.mark.parametrize("rows", [8, 9])
def test_who_multiplies_dense_weights(runs, rows, dtype):
    x, weight, tau = torch.randn(rows, 64).to(dtype), torch.randn(64, 40).to(dtype), torch.tensor([0.5])
    ours = [] if rows <= 8 and dtype == torch.float32 else [rows]
    check(gemm.dense_linear(x, weight), x.double() @ weight.double(), 1e-6)
    check(gemm.sparse_linear(x, weight, tau), sparsify(x, tau).double() @ weight.double(), 1e-6)
    assert runs == 2 * ours
    runs.clear()
    sparse_linear(x, weight, tau)
    assert runs == ([] if rows == 8 else [9])
    names = {8: "cpu", 9: "gemm (panels)"}
    assert table.described(table.Problem(x)) == names[rows]


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_who_multiplies_weights_with_scales(runs, format):
    weight, tau = make(format, (256, 96)), torch.tensor([0.5])
    for rows in (8, 9):
        sparse_linear(torch.randn(rows, 256), weight, tau)
    decoded.sparse_linear(torch.randn(10, 256), weight, torch.rand(2), shard_sizes=[33, 63])
    across = replace(weight, codes=weight.codes.t().contiguous().t())
    check(sparse_linear(x := torch.randn(11, 256), across, tau), truth(x, across, [tau]), 1e-6)
    assert runs == ([9, 10] if weight.unit == 1 else [9])


def test_a_gradient_is_not_ours_to_lose(runs):
    x, weight = torch.randn(9, 64, requires_grad=True), torch.randn(64, 40)
    gemm.dense_linear(x, weight).sum().backward()
    assert x.grad is not None and not runs
    sparse_linear(x, weight, torch.tensor([0.5])).sum().backward()
    assert runs == [9]


def test_the_reason_why_not(monkeypatch, runs):
    x, weight = torch.randn(9, 64), torch.randn(64, 40)
    four = make("int4", (64, 40))

    def why(x=x, weight=weight, features=AVX2, native=()):
        monkeypatch.setattr(processor, "features", lambda: features)
        monkeypatch.setattr(machine, "native_dtypes", lambda: frozenset(native))
        return panels.why_not(x, weight)

    assert not why() and not why(x.bfloat16(), None) and not why(x, four)
    wide = AVX2 | {"avx512f"}
    assert why(x.bfloat16(), None, wide, [torch.bfloat16]) == "torch multiplies bfloat16, which is native here"
    assert why(features=wide) == "torch multiplies float32 where there is AVX-512"
    assert not why(x, four, wide, [torch.bfloat16])
    assert why(features=frozenset()) == "for processors with AVX2 and FMA"
    assert why(x[:8]) == "torch multiplies 1 to 8 rows of float32"
    assert why(x.double(), weight.double()) == "for float32, bfloat16 and float16, not torch.float64"
    assert "contiguous" in why(x, weight[:, :20]) and "contiguous" in why(x.half(), weight)
    assert why(torch.empty(9, 64, device="meta")) == "for CPUs, not meta"
    across = replace(four, codes=four.codes.t().contiguous().t())
    problem = table.Problem(x, across)
    assert table.described(problem) == "decoded" and "arranged" in table.reasons(problem)["panels"]
