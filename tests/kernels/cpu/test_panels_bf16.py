# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel for many rows in bfloat16: every format against float64, with and without tiles, and when it runs."""

import functools

import pytest
import torch

from spon_plugin import machine
from spon_plugin.kernels import gemm, sparse_linear, table
from spon_plugin.kernels.cpu import panels
from spon_plugin.kernels.cpu.kernel import is_available
from spon_plugin.masking import sparsify

processor = pytest.importorskip("spon_plugin.kernels.cpu.processor", exc_type=ImportError)
pytestmark = pytest.mark.skipif(not is_available(), reason="needs Numba and GNU's OpenMP")
from tests.kernels.cpu.assembly import assembly  # noqa: E402 (needs Numba itself)
from tests.kernels.cpu.test_panels import FORMATS as SCALED  # noqa: E402
from tests.kernels.cpu.test_scaled_kernel import check, make  # noqa: E402

XEON = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512bf16"})
# Less than a tile of rows, a tile, two and one more, and more than stays in the second cache.
ROWS = (1, 7, 16, 33, 200)
FORMATS = {**SCALED, "bfloat16": {}}


def made(kind, shape):
    return torch.randn(shape).bfloat16() if kind == "bfloat16" else make(kind.split()[0], shape, **FORMATS[kind])


def truth(x, weight, thresholds, bias=None, sizes=None):
    """With the weight rounded to bfloat16."""
    dense = weight if isinstance(weight, torch.Tensor) else weight.dense().bfloat16()
    columns = dense.double().split(sizes or [dense.shape[1]], 1)
    y = torch.cat([sparsify(x, tau).double() @ part for tau, part in zip(thresholds, columns, strict=True)], -1)
    return y if bias is None else y + bias.double()


@functools.cache
def compiled(how):
    """The worker with tiles or without, and what keeps it."""
    from numba import cfunc, types

    from spon_plugin.kernels.cpu import panels_bf16_worker, panels_layout, steps

    if how == "tiles" and not panels_bf16_worker.has_tiles():
        return None
    before = panels_bf16_worker._multiply, panels_bf16_worker.thread_function
    panels_bf16_worker._multiply = getattr(panels_bf16_worker, f"_multiply_by_{how}")
    panels_bf16_worker.thread_function = cfunc(types.void(types.CPointer(types.int64)), **steps.OPTIONS)
    try:
        worker = panels_bf16_worker.compile_panels_bf16_worker()
    finally:
        panels_bf16_worker._multiply, panels_bf16_worker.thread_function = before
    return worker, worker.address, panels_layout.BF16_COLUMNS, panels_layout.BF16_PANEL


@pytest.fixture(params=["tiles", "pairs"])
def multiply(request, monkeypatch):
    """`panels.sparse_linear` in bfloat16, by one of the two instruction sets."""
    from spon_plugin.kernels.cpu import panel_tile_bf16

    if not panel_tile_bf16.is_available() or (worker := compiled(request.param)) is None:
        pytest.skip("this processor multiplies no bfloat16 so")
    monkeypatch.setattr(machine, "native_dtypes", lambda: frozenset({torch.bfloat16}))
    monkeypatch.setattr(panels, "_worker", lambda bf16: worker)
    return panels.sparse_linear


@pytest.mark.parametrize("shape", [(300, 77), (1, 1), (512, 256), (1057, 1042)], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", FORMATS)
def test_formats_and_shapes(multiply, kind, rows, shape):
    weight, x = made(kind, shape), torch.randn(rows, shape[0]).bfloat16()
    tau, bias = torch.rand(shape[0]), torch.randn(shape[1])
    check(multiply(x, weight, tau, bias), truth(x, weight, [tau], bias), 4e-3)
    check(multiply(x, weight, torch.tensor([0.5])), truth(x, weight, [torch.tensor([0.5])]), 4e-3)
    check(multiply(x, weight, None), truth(x, weight, [torch.tensor([-1.0])]), 4e-3)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "bfloat16"])
def test_shards_and_a_part_of_a_weight(multiply, kind):
    whole, x, sizes = made(kind, (256, 192)), torch.randn(11, 256).bfloat16(), [40, 16, 9]
    part, taus = whole.shard(64, 129) if whole.unit == 1 else whole.shard(64, 192), torch.rand(3, 256)
    sizes[-1] += part.out_features - sum(sizes)
    check(multiply(x, part, taus, shard_sizes=sizes), truth(x, part, list(taus), None, sizes), 4e-3)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4", "fp8"])
def test_bits_depend_on_neither_threads_nor_other_rows(multiply, kind):
    weight = made(kind, (300, 1042))
    x, tau, bias = torch.randn(40, 300).bfloat16(), torch.tensor([0.5]), torch.randn(1042)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(multiply(x, weight, tau, bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
    for rows in (slice(0, 1), slice(3, 12), slice(17, 40)):
        assert torch.equal(multiply(x[rows], weight, tau, bias), found[0][rows])


def test_more_rows_than_one_go(multiply, monkeypatch):
    monkeypatch.setattr(panels, "ROWS", 16)
    monkeypatch.setattr(panels, "BF16_SUMS", 1)  # a panel at a time
    weight, x, tau = made("int4 zeros offsets", (200, 1100)), torch.randn(37, 200).bfloat16(), torch.tensor([0.5])
    check(multiply(x, weight, tau), truth(x, weight, [tau]), 4e-3)


@pytest.mark.parametrize("inputs", [63, 64])
def test_nan_stays_in_its_row_and_scratch_is_cleared(multiply, inputs):
    weight, other = torch.randn(inputs, 40).bfloat16(), torch.full((600, 600), torch.nan).bfloat16()
    multiply(other[:40], other, None)  # leaves NaN wherever it worked
    x = torch.zeros(20, inputs).bfloat16()
    x[3, 5] = torch.nan
    y = multiply(x, weight, torch.tensor([0.5]))
    assert y[3].isnan().all() and (y[[row for row in range(20) if row != 3]] == 0).all()


def test_an_odd_last_input_has_no_second(multiply):
    weight = torch.full((3, 40), torch.inf).bfloat16()
    assert (multiply(torch.ones(2, 3).bfloat16(), weight, None) == torch.inf).all()


@pytest.fixture
def runs(monkeypatch):
    """The rows of each call of the kernel, on a Xeon that multiplies bfloat16; nothing is compiled."""
    monkeypatch.setattr(machine, "native_dtypes", lambda: frozenset({torch.bfloat16}))
    monkeypatch.setattr(processor, "features", lambda: XEON)
    rows = []

    def run(x, weight, threshold, bias=None, *, shard_sizes=None):
        rows.append(x.shape[:-1].numel())
        outputs = weight.shape[1] if isinstance(weight, torch.Tensor) else weight.out_features
        return x.new_zeros((*x.shape[:-1], outputs))

    monkeypatch.setattr(panels, "sparse_linear", run)
    return rows


def test_who_multiplies(runs):
    weight, tau = torch.randn(64, 40).bfloat16(), torch.tensor([0.5])
    for rows in (16, 17):
        gemm.dense_linear(torch.randn(rows, 64).bfloat16(), weight)
        gemm.sparse_linear(torch.randn(rows, 64).bfloat16(), weight, tau)
    assert runs == [16, 16]
    for kind in ("int8", "int4", "fp8"):
        sparse_linear(torch.randn(40, 256).bfloat16(), made(kind, (256, 96)), tau)
    assert runs == [16, 16, 40, 40, 40]


def test_the_reason_why_not(runs, monkeypatch):
    x, four = torch.randn(17, 64).bfloat16(), made("int4", (64, 40))
    assert not panels.why_not(x[:16], None) and not panels.why_not(x, four)
    assert panels.why_not(x, None) == "torch multiplies more than 16 rows of bfloat16"
    assert table.described(table.Problem(x, four)) == "decoded (panels)"
    assert panels._in_bf16(x) and not panels._in_bf16(x.float()) and not panels._in_bf16(x.half())
    monkeypatch.setattr(processor, "features", lambda: XEON - {"avx512bf16"})
    assert not panels._in_bf16(x) and not panels.why_not(x, four)
    assert panels.why_not(x[:16], None) == "torch multiplies bfloat16, which is native here"
    monkeypatch.setattr(processor, "features", lambda: XEON)
    monkeypatch.setattr(machine, "native_dtypes", frozenset)
    assert not panels._in_bf16(x) and not panels.why_not(x, None)


def generator_of(intrinsic, arguments):
    """What writes an intrinsic's instructions."""
    return intrinsic._defn(None, *[None] * arguments)[1]


@pytest.mark.parametrize("cpu", ["sapphirerapids", "znver4"])
def test_pairs_keep_their_sums_in_registers(cpu):
    from llvmlite import ir

    from spon_plugin.kernels.cpu import panel_tile, panel_tile_bf16

    if panel_tile.LANES != 16:
        pytest.skip("the vectors of this module follow the processor")
    lines = assembly(cpu, [ir.IntType(64)] * 4, generator_of(panel_tile_bf16.pairs_8, 4))
    products = [k for k, line in enumerate(lines) if "vdpbf16ps" in line]
    assert len(products) == 16
    loop = lines[max(k for k, line in enumerate(lines[: products[0]]) if line.startswith(".LBB")) : products[-1]]
    assert sum("zmm" in line and "rsp" in line for line in loop) == 0


@pytest.mark.parametrize("tiles", [1, 2])
def test_tiles_are_amx(tiles):
    from llvmlite import ir

    from spon_plugin.kernels.cpu import panel_tile_bf16

    intrinsic = getattr(panel_tile_bf16, f"tiles_{tiles}")
    lines = assembly("sapphirerapids", [ir.IntType(64)] * 4, generator_of(intrinsic, 4))
    count = {name: sum(name in line for line in lines) for name in ("tdpbf16ps", "tileloadd", "tilestored")}
    unrolled = count["tdpbf16ps"] // (2 * tiles)  # a step loads its rows' tiles and two of the panel, once
    assert unrolled and count["tdpbf16ps"] == unrolled * 2 * tiles
    assert count["tileloadd"] == 2 * tiles + unrolled * (tiles + 2) and count["tilestored"] == 2 * tiles
