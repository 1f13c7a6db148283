# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel against float64; what it must not read, mix up between rows and threads, or round wrongly."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spon_plugin.kernels import op, reference, table
from spon_plugin.kernels.arguments import Thresholds
from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.kernels.cpu import panels
from spon_plugin.kernels.few_rows import CPU_ROWS
from spon_plugin.masking import keep_mask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
SHAPES = ((1, 1), (7, 5), (300, 70), (577, 191), (1000, 3000))
ROWS = (1, 2, 3, 5, 8, 17)
KINDS = ("one", "channels", "shards", "shards-channels")
BIASES = ("none", "fp32", "own")
SPARSITY = (0.0, 0.3, 0.5, 0.9, 1.0)


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    pytest.importorskip("numba", reason="the CPU kernel is compiled by Numba")
    if not cpu.is_available():
        pytest.skip("the CPU kernel needs the calls of GNU's OpenMP")


@pytest.fixture(params=[1, 2, 3], ids="threads={}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def arguments(
    dtype: torch.dtype = torch.float32,
    rows: int = 1,
    shape: tuple[int, int] = (577, 191),
    sparsity: float = 0.5,
    kind: str = "one",
    bias: str = "fp32",
    seed: int = 0,
) -> dict:
    """Random arguments whose threshold masks about `sparsity` of x: exactly nothing at 0, everything at 1."""
    torch.manual_seed(seed)
    in_features, out_features = shape
    x = torch.randn(rows, in_features).to(dtype)
    sizes = None
    if "shards" in kind:
        first = out_features // 3
        sizes = [first, out_features - first] if first else [out_features]
    n_shards = len(sizes or [0])
    shapes = {
        "one": (1,), "channels": (in_features,), "shards": (n_shards,), "shards-channels": (n_shards, in_features)
    }  # fmt: skip
    middle = x.abs().float().flatten().quantile(sparsity) if sparsity else torch.tensor(-1.0)
    spread = torch.rand(shapes[kind]) * (0.2 if sparsity else 0.0)
    bias_value = None if bias == "none" else torch.randn(out_features).to(dtype if bias == "own" else torch.float32)
    return {
        "x": x,
        "weight_t": torch.randn(in_features, out_features).to(dtype),
        "threshold": middle * (1 + spread),
        "bias": bias_value,
        "shard_sizes": sizes,
    }


def exact(case: dict) -> Tensor:
    wide = {name: value.double() for name, value in case.items() if name != "threshold" and isinstance(value, Tensor)}
    return reference.sparse_linear(**{**case, **wide})


def assert_near(received: Tensor, expected: Tensor, tolerance: float) -> None:
    assert received.shape == expected.shape
    norm = expected.double().norm()
    assert (received.double() - expected.double()).norm() <= tolerance * norm + (1e-30 if norm == 0 else 0)


def sweep() -> list[tuple]:
    """Shapes times rows in full; the other parameters are spread over them."""
    rest = list(itertools.product(KINDS, BIASES, SPARSITY))
    pairs = itertools.product(SHAPES, ROWS)
    return [
        (shape, rows, *rest[(17 * i + j * 23) % len(rest)]) for i, (shape, rows) in enumerate(pairs) for j in (0, 1)
    ]


@pytest.mark.parametrize("run", [cpu.sparse_linear, panels.sparse_linear], ids=["cpu", "panels"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", sweep(), ids=lambda case: "-".join(map(str, case)).replace(" ", ""))
def test_matches_float64(dtype: str, case: tuple, run: Callable[..., Tensor]) -> None:
    shape, rows, kind, bias, sparsity = case
    given = arguments(DTYPES[dtype], rows, shape, sparsity, kind, bias)
    y = run(*list(given.values())[:4], shard_sizes=given["shard_sizes"])
    assert y.dtype == DTYPES[dtype]
    assert_near(y, exact(given), TOLERANCE[y.dtype])


def test_the_sweep_is_of_all_values_and_hits_the_ends() -> None:
    columns = [set(column) for column in zip(*sweep(), strict=True)]
    assert columns == [set(SHAPES), set(ROWS), set(KINDS), set(BIASES), set(SPARSITY)]
    for kind in KINDS:
        nothing, everything = (arguments(rows=3, sparsity=s, kind=kind) for s in (0.0, 1.0))
        for case, share in ((nothing, 1.0), (everything, 0.0)):
            rows = Thresholds.of(case["threshold"], case["weight_t"], case["shard_sizes"]).rows
            assert all(keep_mask(case["x"], row).float().mean() == share for row in rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("shape", [(3, 2), (577, 191), (700, 2500)], ids=str)
def test_threads_share_the_work(shape: tuple, rows: int, dtype: str, threads: int) -> None:
    for sparsity in (0.0, 0.6, 1.0):
        given = arguments(DTYPES[dtype], rows, shape, sparsity, "shards", "own")
        assert_near(cpu.sparse_linear(**given), exact(given), TOLERANCE[DTYPES[dtype]])


@pytest.mark.parametrize("rows", [1, 4])
def test_same_bits_again(rows: int, threads: int) -> None:
    given = arguments(rows=rows, shape=(1000, 300))
    first, *others = (cpu.sparse_linear(**given) for _ in range(10))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 4, 7, 8])
def test_unmasked_rows_have_the_bits_that_they_have_alone(rows: int, dtype: str, threads: int) -> None:
    """What verifies drafts row by row in one step must not depend on how many there are."""
    given = arguments(DTYPES[dtype], rows, shape=(577, 191))
    given["x"][0, ::3] = 0  # in one row alone: no mask may move the threads' shares
    given["threshold"] = torch.full((1,), -1.0)
    alone = [cpu.sparse_linear(**{**given, "x": row[None]}) for row in given["x"]]
    assert torch.equal(cpu.sparse_linear(**given), torch.cat(alone))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3])
def test_skipped_weights_are_not_read(rows: int, kind: str) -> None:
    given = arguments(rows=rows, kind=kind, sparsity=0.8)
    expected = exact(given)
    start = 0
    thresholds = Thresholds.of(given["threshold"], given["weight_t"], given["shard_sizes"])
    for row, size in zip(thresholds.rows, thresholds.sizes, strict=True):
        skipped = ~keep_mask(given["x"], row).any(0)
        assert skipped.any()
        given["weight_t"][skipped, start : start + size] = float("nan")
        start += size
    assert_near(cpu.sparse_linear(**given), expected, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_broken_input_shows_in_its_own_row_only(value: float, dtype: str) -> None:
    given = arguments(DTYPES[dtype], rows=4, shape=(300, 70))
    before = cpu.sparse_linear(**given)
    given["x"][2, 11] = value
    y, expected = cpu.sparse_linear(**given), reference.sparse_linear(**given)
    assert torch.equal(y[[0, 1, 3]].isfinite(), torch.ones(3, 70, dtype=torch.bool))
    assert_near(y[[0, 1, 3]], before[[0, 1, 3]], TOLERANCE[DTYPES[dtype]])
    assert torch.equal(y[2].isnan(), expected[2].isnan()) and not y[2].isfinite().any()
    assert torch.equal(y[2].nan_to_num(0), expected[2].nan_to_num(0))


def test_nan_is_kept_where_everything_is_masked() -> None:
    given = arguments(rows=2, sparsity=1.0)
    given["x"][1, 3] = float("nan")
    y = cpu.sparse_linear(**given)
    assert y[1].isnan().all() and torch.equal(y[0], given["bias"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
def test_threshold_is_exclusive(rows: int, dtype: str) -> None:
    x = torch.tensor([[0.5, -0.5, 0.50390625, -0.0, 0.25]] * rows, dtype=DTYPES[dtype])
    weight = torch.eye(5, dtype=DTYPES[dtype])
    y = cpu.sparse_linear(x, weight, torch.tensor([0.5]))
    assert torch.equal(y, torch.tensor([[0, 0, 0.50390625, 0, 0]] * rows, dtype=DTYPES[dtype]))
    # In float32, whatever the dtype of x: 0.5's neighbour below is another threshold.
    below = torch.nextafter(torch.tensor([0.5]), torch.zeros(1))
    assert torch.equal(cpu.sparse_linear(x, weight, below)[:, :2], x[:, :2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_and_signed_zeros(dtype: str) -> None:
    tiny = torch.finfo(DTYPES[dtype]).smallest_normal / 4
    x = torch.tensor([[tiny, -tiny, 0.0, -0.0]], dtype=DTYPES[dtype])
    weight = torch.eye(4, dtype=DTYPES[dtype])
    weight[2:] = float("nan")  # zeros are masked at 0, whatever their sign
    y = cpu.sparse_linear(x, weight, torch.zeros(1))
    assert torch.equal(y, torch.tensor([[tiny, -tiny, 0, 0]], dtype=DTYPES[dtype])) and y[0, 0] > 0
    assert cpu.sparse_linear(x, weight, torch.tensor([float(tiny)])).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_as_torch_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    limits = torch.finfo(dtype)
    above = torch.tensor(limits.max, dtype=torch.float64) * torch.tensor([1 + limits.eps / 8, 1 + limits.eps / 2])
    ties = torch.tensor([1 + k * limits.eps / 2 for k in range(1, 8)])
    special = [float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-42, limits.smallest_normal / 3]
    noise = torch.randn(5000) * torch.logspace(-9, 9, 5000)
    values = torch.cat([above.float(), -above.float(), ties, -ties, torch.tensor(special), noise])
    # Everything is masked, so the float32 bias alone is rounded. A NaN whose payload is all ones must stay one too.
    values = torch.cat([values, torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)])
    zeros = torch.zeros(1, 3, dtype=dtype)
    y = cpu.sparse_linear(zeros, torch.ones(3, len(values), dtype=dtype), torch.zeros(1), values)[0]
    expected = values.to(dtype)
    assert expected.isinf().any() and expected.isnan().sum() == 3
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(0), expected.nan_to_num(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_arguments(dtype: str) -> None:
    given = arguments(DTYPES[dtype], rows=3, kind="shards-channels", bias="own")
    expected = cpu.sparse_linear(**given)
    for name in ("x", "bias", "threshold"):
        given[name] = torch.stack([given[name], torch.full_like(given[name], 7)], -1)[..., 0]
        assert not given[name].is_contiguous()
    assert torch.equal(cpu.sparse_linear(**given), expected)
    transposed = given["x"].t().contiguous().t()
    assert torch.equal(cpu.sparse_linear(**{**given, "x": transposed}), expected)


@pytest.mark.parametrize("shape", [(577,), (1, 577), (2, 1, 577), (2, 2, 2, 577)], ids=str)
def test_leading_shapes(shape: tuple) -> None:
    given = arguments(rows=torch.Size(shape[:-1]).numel())
    y = cpu.sparse_linear(**{**given, "x": given["x"].view(shape)})
    assert y.shape == (*shape[:-1], 191) and torch.equal(y.view(-1, 191), cpu.sparse_linear(**given))


def test_python_threads_do_not_share_scratch() -> None:
    cases = [arguments(rows=1 + seed % 3, shape=(500, 100 + 50 * seed), seed=seed) for seed in range(8)]
    expected = [cpu.sparse_linear(**case) for case in cases]

    def repeat(number: int) -> bool:
        return all(torch.equal(cpu.sparse_linear(**cases[number]), expected[number]) for _ in range(40))

    # How many threads share a call's work depends on the calling thread, and with it the order of sums.
    before = torch.get_num_threads()
    with ThreadPoolExecutor(8, initializer=torch.set_num_threads, initargs=(before,)) as pool:
        assert all(pool.map(repeat, range(8)))


def test_a_default_device_does_not_move_the_result() -> None:
    given = arguments()
    expected = cpu.sparse_linear(**given)
    with torch.device("meta"):
        cpu._local.__dict__.clear()
        assert torch.equal(cpu.sparse_linear(**given), expected)


PROGRAMS = {
    "nothing is imported that is not used": """
import sys, spon_plugin, spon_plugin.kernels
assert not {"numba", "triton", "llvmlite"} & {name.split(".")[0] for name in sys.modules}
""",
    "without Numba a GEMM runs": """
import sys
sys.modules["numba"] = None
import torch
from spon_plugin.kernels import op, sparse_linear
x, w, t = torch.randn(1, 9), torch.randn(9, 4), torch.tensor([0.5])
assert op.implementation(x) == "gemm"
torch.testing.assert_close(sparse_linear(x, w, t), (x * (x.abs() > 0.5)) @ w)
""",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_new_process(program: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[program]], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_operator_takes_an_empty_batch_and_crosses_to_a_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments()
    sizes = given.pop("shard_sizes")
    assert op.sparse_linear(**{**given, "x": given["x"][:0]}, shard_sizes=sizes).shape == (0, 191)
    called = []
    spied = {"run": lambda *args, **kwargs: called.append(1) or cpu.sparse_linear(*args, **kwargs)}
    kernels = tuple(kernel._replace(**spied) if kernel.name == "cpu" else kernel for kernel in table.KERNELS)
    monkeypatch.setattr(table, "KERNELS", kernels)
    for rows in (CPU_ROWS, CPU_ROWS + 1):
        case = arguments(rows=rows)
        assert_near(op.sparse_linear(**case), exact(case), 1e-5)
    assert len(called) == 1
