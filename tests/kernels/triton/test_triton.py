# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the reference and against float64; what they must not read, mix up or wait for."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from spon_plugin import SponError
from spon_plugin.kernels import gemm, reference, sparse_linear
from spon_plugin.kernels.triton import configs
from spon_plugin.kernels.triton import launch as cuda
from spon_plugin.kernels.triton.configs import Launch

pytest.importorskip("triton", reason="the GPU kernels are written in Triton")
from spon_plugin.kernels.triton import compaction as triton_compaction
from spon_plugin.kernels.triton import dense_mask as triton_dense_mask

KERNELS = {"dense_mask": triton_dense_mask.sparse_linear, "compaction": triton_compaction.sparse_linear}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Relative error in the Frobenius norm. Triton's interpreter truncates to bfloat16, which costs 4e-3 by itself.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
LAUNCH = Launch("dense_mask", block_in=16, block_out=16, splits=1, num_warps=4, num_stages=1, resident=4)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and GPU dispatch need a CUDA device")


@dataclass
class Case:
    """Arguments of `sparse_linear`."""

    x: Tensor
    weight_t: Tensor
    threshold: Tensor
    bias: Tensor | None = None
    shard_sizes: Sequence[int] | None = None

    def run(self, function: Callable[..., Tensor], **options: object) -> Tensor:
        return function(self.x, self.weight_t, self.threshold, self.bias, shard_sizes=self.shard_sizes, **options)

    def exact(self) -> Tensor:
        """The result in float64."""
        bias = None if self.bias is None else self.bias.double()
        wide = replace(self, x=self.x.double(), weight_t=self.weight_t.double(), bias=bias)
        return wide.run(reference.sparse_linear)


def make(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    rows: int = 1,
    shape: tuple[int, int] = (53, 37),
    sparsity: float = 0.5,
    kind: str = "one",
    bias: torch.dtype | None = torch.float32,
) -> Case:
    """A random case whose threshold masks about `sparsity` of `x`: exactly nothing at 0, everything at 1."""
    generator = torch.Generator().manual_seed(rows + 100 * shape[0] + shape[1])
    in_features, out_features = shape
    x = torch.randn(rows, in_features, generator=generator).to(dtype)
    weight_t = torch.randn(in_features, out_features, generator=generator).to(dtype)
    sizes = [out_features] if "shards" not in kind or out_features < 3 else [1, (out_features - 1) // 2]
    if len(sizes) > 1:
        sizes.append(out_features - sum(sizes))
    lists = {
        "one": (1,),
        "channels": (in_features,),
        "shards": (len(sizes),),
        "shards-channels": (len(sizes), in_features),
    }
    middle = x.abs().float().quantile(sparsity) if sparsity else torch.tensor(-1.0)
    spread = 1.0 + torch.rand(lists[kind], generator=generator) * (0.0 if sparsity == 0 else 0.5)
    bias_value = None if bias is None else torch.randn(out_features, generator=generator).to(bias)
    case = Case(x, weight_t, middle * spread, bias_value, sizes if "shards" in kind else None)
    for name in ("x", "weight_t", "threshold", "bias"):
        value = getattr(case, name)
        setattr(case, name, None if value is None else value.to(device))
    return case


def assert_near(received: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (received.double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm(), f"relative error {error / expected.double().norm():.1e}"


def all_pairs(**values: Sequence[object]) -> list[dict[str, object]]:
    """Combinations in which every two values of two parameters occur together: far fewer than the whole product."""
    names = list(values)
    left = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in values[a] for y in values[b]}
    chosen = []
    rows = [dict(zip(names, combination, strict=True)) for combination in itertools.product(*values.values())]
    while left:
        best = max(rows, key=lambda row: len(left & set(itertools.combinations(row.items(), 2))))
        left -= set(itertools.combinations(best.items(), 2))
        chosen.append(best)
    return chosen


SWEEP = all_pairs(
    rows=(1, 2, 3, 5, 8, 16),
    sparsity=(0.0, 0.3, 0.5, 0.9, 1.0),
    kind=("one", "channels", "shards", "shards-channels"),
    shape=((64, 32), (53, 37), (17, 3), (1, 5)),
    splits=(1, 3),
    bias=("fp32", "own", "none"),
)


@pytest.mark.parametrize("case", SWEEP, ids=lambda case: "-".join(str(value) for value in case.values()))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_matches_reference_and_float64(kernel: str, dtype: str, case: dict, device: torch.device) -> None:
    bias = {"fp32": torch.float32, "own": DTYPES[dtype], "none": None}[case["bias"]]
    problem = make(device, DTYPES[dtype], case["rows"], case["shape"], case["sparsity"], case["kind"], bias)
    y = problem.run(KERNELS[kernel], launch=replace(LAUNCH, splits=case["splits"]))
    assert y.dtype == DTYPES[dtype] and y.shape == (case["rows"], case["shape"][1])
    assert_near(y, problem.exact(), TOLERANCE[y.dtype])
    assert_near(y, problem.run(reference.sparse_linear), TOLERANCE[y.dtype])


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kernel", KERNELS)
def test_lists_longer_than_a_chunk(kernel: str, rows: int, device: torch.device) -> None:
    case = make(device, rows=rows, shape=(2 * triton_compaction.CHUNK + 77, 5))
    y = case.run(KERNELS[kernel], launch=replace(LAUNCH, block_in=512, splits=2))
    assert_near(y, case.exact(), 1e-5)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_same_bits_again(kernel: str, rows: int, device: torch.device) -> None:
    case = make(device, torch.bfloat16, rows, (96, 40))
    first, *others = [case.run(KERNELS[kernel], launch=replace(LAUNCH, splits=4)) for _ in range(3)]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_tiles_that_are_copied_ahead(kernel: str, splits: int, device: torch.device) -> None:
    case = make(device, torch.bfloat16, 1, (200, 40), sparsity=0.7)
    expected = case.exact()
    case.weight_t[case.x[0].abs() <= case.threshold] = float("nan")
    assert_near(case.run(KERNELS[kernel], launch=replace(LAUNCH, splits=splits, num_stages=3)), expected, 1e-2)


@pytest.mark.parametrize("kind", ["one", "channels", "shards"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_of_masked_channels_are_not_read(kernel: str, rows: int, kind: str, device: torch.device) -> None:
    """A weight that is read shows, because zero times NaN is NaN."""
    case = make(device, rows=rows, sparsity=0.7, kind=kind)
    expected = case.exact()
    begin = 0
    limits = case.threshold.reshape(-1, 1) if kind == "shards" else case.threshold[None]
    for limit, size in zip(limits, case.shard_sizes or [37], strict=True):
        masked = (case.x.abs() <= limit).all(dim=0)
        assert masked.any()
        case.weight_t[masked, begin : begin + size] = float("nan")
        begin += size
    for splits in (1, 2):
        assert_near(case.run(KERNELS[kernel], launch=replace(LAUNCH, splits=splits)), expected, 1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, from the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_and_infinity_show_in_their_row_only(kernel: str, dtype: str, device: torch.device) -> None:
    case = make(device, DTYPES[dtype], rows=4, sparsity=0.9)
    clean = case.run(KERNELS[kernel], launch=LAUNCH)
    case.x[1, 7] = float("nan")
    case.x[2, 20] = float("-inf")
    y = case.run(KERNELS[kernel], launch=LAUNCH)
    assert torch.isnan(y[1]).all()
    assert torch.isinf(y[2]).all()
    assert_near(y[[0, 3]], clean[[0, 3]], TOLERANCE[y.dtype])
    alone = replace(case, x=case.x[1:2]).run(KERNELS[kernel], launch=LAUNCH)
    assert torch.isnan(alone).all()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_nan_make_nothing_be_read(kernel: str, rows: int, splits: int, device: torch.device) -> None:
    """Rows that a batch is padded with hold anything: their NaN must not have a whole weight read for nothing."""
    case = make(device, rows=rows, shape=(triton_compaction.CHUNK + 9, 5), sparsity=0.9)
    case.x[0] = float("nan")
    expected = case.exact()
    case.weight_t[(case.x[1:].abs() <= case.threshold).all(dim=0)] = float("nan")
    y = case.run(KERNELS[kernel], launch=replace(LAUNCH, block_in=256, splits=splits))
    assert torch.isnan(y[0]).all()
    assert_near(y[1:], expected[1:], 1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_threshold_is_exclusive_and_compared_in_float32(kernel: str, device: torch.device) -> None:
    """0.3 lies between two bfloat16 numbers: rounding it to bfloat16 would keep or drop the one below it."""
    below, above = torch.tensor([0.2988281, 0.3007812]).bfloat16()
    x = torch.stack([below, above, -above, torch.tensor(0.5).bfloat16()])[None].to(device)
    weight_t = torch.eye(4, dtype=torch.bfloat16, device=device)
    for limit, kept in ((0.3, [0, 1, 1, 1]), (0.5, [0, 0, 0, 0])):
        y = KERNELS[kernel](x, weight_t, torch.tensor([limit], device=device), launch=LAUNCH)
        assert (y != 0).int().tolist() == [kept]


def non_contiguous(x: Tensor, how: str) -> Tensor:
    """`x` with the same values, laid out otherwise."""
    if how == "strided":
        return torch.stack([x, -x], dim=-1)[..., 0]
    if how == "transposed":
        return x.t().contiguous().t()
    return torch.cat([x, -x], dim=-1)[..., : x.shape[-1]]


@pytest.mark.parametrize("how", ["strided", "transposed", "columns of a wider matrix"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_x_need_not_be_contiguous(kernel: str, how: str, device: torch.device) -> None:
    case = make(device, rows=3)
    other = replace(case, x=non_contiguous(case.x, how))
    assert torch.equal(other.x, case.x) and not other.x.is_contiguous()
    assert torch.equal(other.run(KERNELS[kernel], launch=LAUNCH), case.run(KERNELS[kernel], launch=LAUNCH))


@pytest.mark.parametrize("kernel", KERNELS)
def test_leading_dimensions(kernel: str, device: torch.device) -> None:
    case = make(device, rows=6)
    y = case.run(KERNELS[kernel], launch=LAUNCH)
    folded = replace(case, x=case.x.view(2, 1, 3, -1)).run(KERNELS[kernel], launch=LAUNCH)
    assert torch.equal(folded, y.view(2, 1, 3, -1))
    single = replace(case, x=case.x[0]).run(KERNELS[kernel], launch=LAUNCH)
    assert single.shape == (37,)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(17, 53)}, "17 rows"),
        ({"x": torch.zeros(0, 53)}, "0 rows"),
        ({"x": torch.zeros(1, 53).double(), "weight_t": torch.zeros(53, 37).double()}, "float64"),
        ({"threshold": torch.zeros(2)}, "threshold"),
    ],
    ids=["too many rows", "no rows", "float64", "threshold"],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_refuses(kernel: str, change: dict, named: str) -> None:
    case = replace(make(torch.device("cpu")), **change)
    with pytest.raises(SponError, match=named):
        case.run(KERNELS[kernel], launch=LAUNCH)


def dispatched(case: Case) -> Tensor:
    return cuda.sparse_linear(case.x, case.weight_t, case.threshold, case.bias, case.shard_sizes)


@pytest.mark.parametrize("rows", [0, 1, 4, 17])
@pytest.mark.parametrize("dtype", [*DTYPES, "fp64"])
def test_dispatcher_is_right_at_every_batch(dtype: str, rows: int, device: torch.device) -> None:
    case = make(device, {**DTYPES, "fp64": torch.float64}[dtype], max(rows, 1), kind="shards")
    case.x = case.x[:rows]
    y = dispatched(case)
    assert y.dtype == case.x.dtype and y.shape == (rows, 37)
    assert_near(y, case.exact(), TOLERANCE.get(y.dtype, 1e-6))


def test_dispatcher_obeys_the_configuration(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    used = []
    monkeypatch.setattr(cuda, "kernel_of", lambda name, device: lambda *args, launch, **rest: used.append(launch))
    monkeypatch.setattr(gemm, "sparse_linear", lambda *args, **rest: used.append("gemm"))
    for rows in (1, 4, 16, 17):
        dispatched(make(device, torch.bfloat16, rows))
    name = cuda.device_name(device)
    expected = [configs.choose(name, torch.bfloat16, 53, 37, rows) or "gemm" for rows in (1, 4, 16)]
    assert used == [*expected, "gemm"]


def test_dispatcher_without_channels(device: torch.device) -> None:
    bias = torch.ones(5, device=device)
    x, weight_t = torch.ones(2, 0, device=device), torch.ones(0, 5, device=device)
    y = cuda.sparse_linear(x, weight_t, torch.zeros(1, device=device), bias)
    assert torch.equal(y, torch.ones(2, 5, device=device))


def test_without_triton_it_multiplies_densely_and_says_so(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setitem(sys.modules, "spon_plugin.kernels.triton.dense_mask", None)
    case = make(device)
    cuda.kernel_of.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="Triton cannot be imported"):
            y = dispatched(case)
    finally:
        cuda.kernel_of.cache_clear()
    assert_near(y, case.exact(), 1e-5)


def test_triton_is_imported_by_its_first_launch_only() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, spon_plugin.kernels.triton.launch\n"
        "from spon_plugin.kernels import sparse_linear\n"
        "y = sparse_linear(torch.ones(64, 4), torch.ones(4, 2), torch.zeros(1), torch.ones(2))\n"
        "assert y.tolist() == [[5.0, 5.0]] * 64\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("bias", ["fp32", "own", "none"])
@pytest.mark.parametrize("kind", ["one", "channels", "shards", "shards-channels"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_gemm(dtype: str, kind: str, bias: str, device: torch.device) -> None:
    biases = {"fp32": torch.float32, "own": DTYPES[dtype], "none": None}
    case = make(device, DTYPES[dtype], rows=33, kind=kind, bias=biases[bias])
    case.x = non_contiguous(case.x, "strided").view(3, 11, -1)
    assert_near(case.run(gemm.sparse_linear), case.exact(), TOLERANCE[case.x.dtype])


def test_masked_gemm_keeps_nan_and_takes_inputs_that_want_gradients(device: torch.device) -> None:
    case = make(device, rows=18, kind="shards")
    case.x[3, 5] = float("nan")
    y = replace(case, x=case.x.requires_grad_()).run(gemm.sparse_linear)
    assert torch.isnan(y).any(dim=1).nonzero().tolist() == [[3]]


@needs_cuda
@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("kind", ["one", "shards-channels"])
def test_cuda_graph_replays_with_another_x_and_threshold(rows: int, kind: str) -> None:
    device = torch.device("cuda")
    case = make(device, torch.bfloat16, rows, (256, 192), kind=kind)
    dispatched(case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dispatched(case)
    for factor in (1.0, 0.5, 2.0):
        case.x.copy_(torch.randn_like(case.x))
        case.threshold.mul_(factor)
        graph.replay()
        assert_near(y, case.exact(), 1e-2)


@needs_cuda
@pytest.mark.parametrize("kernel", KERNELS)
def test_cuda_graph_of_each_kernel(kernel: str) -> None:
    case = make(torch.device("cuda"), torch.float16, 3, (2500, 192), kind="shards")
    launch = replace(LAUNCH, block_in=32, block_out=64, splits=4)
    case.run(KERNELS[kernel], launch=launch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.run(KERNELS[kernel], launch=launch)
    for sparsity in (0.0, 0.5, 0.99):
        case.x.copy_(torch.randn_like(case.x))
        case.threshold.fill_(case.x.abs().float().quantile(sparsity))
        graph.replay()
        assert_near(y, case.exact(), 1e-2)


@needs_cuda
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_torch_compile_on_cuda(rows: int) -> None:
    case = make(torch.device("cuda"), torch.bfloat16, rows, (256, 192), kind="shards")
    compiled = torch.compile(lambda case: case.run(sparse_linear) + 1, fullgraph=True)
    assert_near(compiled(case) - 1, case.exact(), 1e-2)


@needs_cuda
@pytest.mark.parametrize("rows", [1, 40])
def test_opcheck_on_cuda(rows: int) -> None:
    case = make(torch.device("cuda"), torch.bfloat16, rows, kind="shards")
    arguments = (case.x, case.weight_t, case.threshold, case.bias, case.shard_sizes)
    torch.library.opcheck(torch.ops.spon.sparse_linear.default, arguments)


@needs_cuda
@pytest.mark.parametrize("shape", [(4096, 6144), (14336, 4096), (576, 1536)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_shipped_launches_at_real_sizes(rows: int, shape: tuple[int, int]) -> None:
    case = make(torch.device("cuda"), torch.bfloat16, rows, shape)
    for name in KERNELS:
        for device in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "another"):
            launch = configs.choose(device, torch.bfloat16, *shape, min(rows, 4))
            assert launch is not None
            assert_near(case.run(KERNELS[name], launch=launch), case.exact(), 1e-2)
