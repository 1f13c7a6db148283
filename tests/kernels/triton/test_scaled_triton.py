# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels for weights with scales against the decoded weight in float64, and what they must not read."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from spon_plugin.kernels import sparse_linear
from spon_plugin.kernels.triton import configs
from spon_plugin.kernels.triton import launch as cuda
from spon_plugin.kernels.triton.configs import Launch
from spon_plugin.masking import keep_mask, sparsify
from spon_plugin.weights.fp8 import Fp8Weight
from spon_plugin.weights.int4 import Int4Weight, pack_nibbles
from spon_plugin.weights.int8 import Int8Weight
from spon_plugin.weights.scaled import ScaledWeight

pytest.importorskip("triton", reason="the GPU kernels are written in Triton")
from spon_plugin.kernels.triton import scaled, scaled_compaction

FORMATS = ("int8", "int4", "fp8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Relative error in the Frobenius norm: float32 sums; an output's rounding, which Triton's interpreter truncates.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="real sizes need a CUDA device")
LAUNCH = Launch("dense_mask", block_in=64, block_out=32, splits=2, num_warps=1, num_stages=1, resident=4)


def kernels(rows: int) -> list[Callable[..., Tensor]]:
    """Those for so many rows."""
    return [scaled.sparse_linear, scaled_compaction.sparse_linear][: 2 if rows == 1 else 1]


def make(
    format: str,
    shape: tuple[int, int] = (130, 64),
    group: int = 0,
    zeros: bool = False,
    offsets: bool = False,
    scale: torch.dtype = torch.float32,
) -> ScaledWeight:
    """Random codes; one scale an output if `group` is 0."""
    torch.manual_seed(0)
    inputs, outputs = shape
    group = group or inputs
    groups = -(-inputs // group)
    scales = (torch.rand(groups, outputs) * 0.1 + 0.01).to(scale)
    given = torch.randn(groups, outputs) * 0.1 if offsets else None
    if format == "fp8":
        return Fp8Weight(torch.randn(shape).to(torch.float8_e4m3fn), scales, None, group, None, given)
    if format == "int8":
        zero = torch.randint(-9, 9, (groups, outputs)).to(torch.int8) if zeros else None
        return Int8Weight(torch.randint(-128, 128, shape).to(torch.int8), scales, zero, group, None, given)
    zero = torch.randint(0, 16, (groups, outputs)).to(torch.uint8) if zeros else None
    return Int4Weight(pack_nibbles(torch.randint(0, 16, shape)), scales, zero, group, None, given)


def moved(weight: ScaledWeight, device: torch.device) -> ScaledWeight:
    parts = {name: getattr(weight, name) for name in ("codes", "scales", "zeros", "offsets")}
    return replace(weight, **{name: part.to(device) for name, part in parts.items() if part is not None})


def exact(
    x: Tensor, weight: ScaledWeight, threshold: Tensor, bias: Tensor | None = None, sizes: Sequence[int] | None = None
) -> Tensor:
    """The result in float64."""
    sizes = sizes or [weight.out_features]
    columns = weight.dense().double().split(sizes, 1)
    y = torch.cat([sparsify(x, tau).double() @ part for tau, part in zip(threshold, columns, strict=True)], -1)
    return y if bias is None else y + bias.double()


def assert_near(received: Tensor, expected: Tensor) -> None:
    error = (received.double() - expected).norm()
    assert error <= TOLERANCE[received.dtype] * expected.norm(), f"relative error {error / expected.norm():.1e}"


@pytest.mark.parametrize(
    ("shape", "group"), [((130, 64), 0), ((300, 77), 128), ((1, 1), 0), ((70, 34), 32), ((130, 64), 64)], ids=str
)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("format", FORMATS)
def test_formats_batches_and_odd_shapes(
    format: str, rows: int, shape: tuple[int, int], group: int, device: torch.device
) -> None:
    weight = moved(make(format, shape, group, zeros=rows == 3), device)
    x, bias = torch.randn(rows, shape[0], device=device), torch.randn(shape[1], device=device)
    tau = torch.tensor([0.6 if shape[0] > 1 else 0.0], device=device)
    for run in kernels(rows):
        assert_near(run(x, weight, tau, bias, launch=LAUNCH), exact(x, weight, [tau], bias))


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("offsets", [False, True], ids=["", "offsets"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("group", [0, 64], ids="g{}".format)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_zero_points_and_offsets(
    format: str, group: int, rows: int, offsets: bool, zeros: bool, device: torch.device
) -> None:
    weight = moved(make(format, (192, 64), group, zeros, offsets), device)
    x, tau = torch.randn(rows, 192, device=device), torch.tensor([0.5], device=device)
    for run in kernels(rows):
        assert_near(run(x, weight, tau, launch=LAUNCH), exact(x, weight, [tau]))


@pytest.mark.parametrize(
    ("dtype", "scale"), [("fp32", torch.bfloat16), ("bf16", torch.float16), ("fp16", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("format", FORMATS)
def test_dtypes(format: str, rows: int, dtype: str, scale: torch.dtype, device: torch.device) -> None:
    weight = moved(make(format, (128, 64), 64, scale=scale), device)
    x, tau = torch.randn(rows, 128, device=device).to(DTYPES[dtype]), torch.tensor([0.5], device=device)
    for run in kernels(rows):
        y = run(x, weight, tau, launch=LAUNCH)
        assert y.dtype == x.dtype
        assert_near(y, exact(x, weight, [tau]))


@pytest.mark.parametrize(("sizes", "per_channel"), [((64, 32, 32), True), ((64, 2, 31), False)], ids=["words", "bytes"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_shards_have_thresholds_of_their_own(
    format: str, rows: int, sizes: tuple[int, ...], per_channel: bool, device: torch.device
) -> None:
    weight = moved(make(format, (130, sum(sizes)), 64), device)
    x = torch.randn(rows, 130, device=device)
    tau = torch.rand(3, 130, device=device) if per_channel else torch.tensor([0.2, 0.9, 0.5], device=device)
    for run in kernels(rows):
        y = run(x, weight, tau, shard_sizes=sizes, launch=LAUNCH)
        assert_near(y, exact(x, weight, list(tau.view(3, -1)), None, sizes))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_skipped_codes_and_scales_are_not_read(format: str, rows: int, device: torch.device) -> None:
    """Rows that no token keeps hold the largest codes or NaN, scales of groups that nobody keeps NaN: none may show."""
    weight, tau = moved(make(format, (256, 64), 64), device), torch.tensor([0.8], device=device)
    x = torch.randn(rows, 256, device=device)
    x[:, 64:192] = 0.1  # two groups that are skipped whole
    expected = exact(x, weight, [tau])
    codes, scales = weight.codes.clone(), weight.scales.clone()
    codes.view(torch.uint8)[~keep_mask(x, tau).any(0)] = 0x7F
    scales[1:3] = torch.nan
    for run in kernels(rows):
        assert_near(run(x, replace(weight, codes=codes, scales=scales), tau, launch=LAUNCH), expected)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("limit", [-1.0, 100.0], ids=["nothing masked", "all masked"])
@pytest.mark.parametrize("format", FORMATS)
def test_full_and_empty_masks(format: str, limit: float, rows: int, device: torch.device) -> None:
    weight, tau = moved(make(format, (130, 64), 32, zeros=True), device), torch.tensor([limit], device=device)
    x, bias = torch.randn(rows, 130, device=device), torch.randn(64, device=device)
    for run in kernels(rows):
        y = run(x, weight, tau, bias, launch=LAUNCH)
        assert_near(y, exact(x, weight, [tau], bias))
        assert limit < 0 or torch.equal(y, bias.expand_as(y))


@pytest.mark.parametrize("words", [False, True], ids=["bytes", "words"])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("format", FORMATS)
def test_codes_come_out_as_they_are(format: str, rows: int, words: bool, device: torch.device) -> None:
    """Each alone in the sum; of e4m3 also the smallest, the largest and both NaN."""
    kind, dtype = {
        "int8": (Int8Weight, torch.int8),
        "int4": (Int4Weight, torch.uint8),
        "fp8": (Fp8Weight, torch.float8_e4m3fn),
    }[format]
    width = 8 if words else 7
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, width).contiguous()
    weight = moved(kind(codes.view(dtype), torch.ones(1, width * kind.unit), None, 256), device)
    dense = weight.dense()
    if rows == 1:
        chosen = torch.tensor([[0], [1], [0x7E], [0x7F], [0x80], [0xFF]])
    else:
        chosen = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F or format != "fp8"])
        chosen = chosen[torch.linspace(0, len(chosen) - 1, 32).long()].view(2, 16)
    for each in chosen.to(device):
        x = torch.nn.functional.one_hot(each, 256).float()
        for run in kernels(rows):
            y = run(x, weight, torch.zeros(1, device=device), launch=LAUNCH)
            assert torch.equal(y.nan_to_num(1e9), dense[each].nan_to_num(1e9)), each


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, from the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_inputs_that_are_no_numbers_show_in_their_own_row(format: str, value: float, device: torch.device) -> None:
    weight, tau = moved(make(format, (130, 64), 64), device), torch.tensor([0.5], device=device)
    x = torch.randn(3, 130, device=device)
    x[1, 100] = value
    y = scaled.sparse_linear(x, weight, tau, launch=LAUNCH)
    assert not y[1].isfinite().any()
    rest = torch.tensor([0, 2], device=device)
    assert_near(y[rest], exact(x[rest], weight, [tau]))
    for run in kernels(1):
        assert not run(x[1:2], weight, tau, launch=LAUNCH).isfinite().any()


@pytest.mark.parametrize("format", FORMATS)
def test_the_launcher_takes_what_it_has_nothing_against(format: str, device: torch.device) -> None:
    weight, tau = moved(make(format, (64, 32), 32), device), torch.tensor([0.5], device=device)
    x = torch.randn(2, 64, device=device).bfloat16()
    assert not cuda.why_not(x, weight)
    assert_near(cuda.sparse_linear_scaled(x, weight, tau), exact(x, weight, [tau]))


@pytest.mark.parametrize(
    ("x", "change", "reason"),
    [
        (torch.zeros(1, 64, dtype=torch.float64), {}, "not torch.float64"),
        (torch.zeros(2, 64), {}, "one row of float32"),
        (torch.zeros(1, 64), {"group_of_row": torch.zeros(64, dtype=torch.int32)}, "act-order"),
        (torch.zeros(1, 64), {"group_size": 24}, "groups of 24"),
        (torch.zeros(1, 64), {"codes": torch.zeros(32, 64, dtype=torch.int8).t()}, "arranged"),
        (torch.zeros(1, 64), {"codes": torch.zeros(64, 32, dtype=torch.uint8)}, "codes of torch.uint8"),
        (torch.zeros(17, 64, dtype=torch.bfloat16), {}, "more rows"),
        (torch.zeros(1, 64), {"scales": torch.zeros(2, 32, device="meta")}, "scales on meta"),
    ],
    ids=["float64", "float32 rows", "act-order", "group", "layout", "codes", "rows", "device"],
)
def test_the_launcher_says_what_it_does_not_take(x: Tensor, change: dict[str, object], reason: str) -> None:
    assert reason in cuda.why_not(x, replace(make("int8", (64, 32), 32), **change))


def test_e4m3_converted_by_the_gpu(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """As from compute capability 8.9 on. Triton's interpreter converts all but NaN right."""
    monkeypatch.setattr(scaled, "converts_fp8", lambda device: True)
    weight, tau = moved(make("fp8", (130, 64), 64), device), torch.tensor([0.5], device=device)
    x = torch.randn(1, 130, device=device)
    for run in kernels(1):
        assert_near(run(x, weight, tau, launch=LAUNCH), exact(x, weight, [tau]))


def test_a_part_of_a_weight_is_read_in_place_and_again_to_the_same_bits(device: torch.device) -> None:
    part = moved(make("int4", (130, 192), 32, zeros=True), device).shard(64, 130)
    x, tau = torch.randn(1, 130, device=device), torch.tensor([0.5], device=device)
    for run in kernels(1):
        y = run(x, part, tau, launch=replace(LAUNCH, splits=3))
        assert_near(y, exact(x, part, [tau]))
        assert torch.equal(y, run(x, part, tau, launch=replace(LAUNCH, splits=3)))


@pytest.mark.parametrize(
    ("format", "capability", "rows", "spreads", "stages"),
    [
        ("int8", (10, 0), 1, True, 3),
        ("int4", (12, 0), 1, True, 3),
        ("fp8", (8, 0), 1, True, 3),
        ("int4", (9, 0), 1, True, 1),
        ("fp8", (10, 0), 1, True, 1),
        ("int8", (10, 0), 4, True, 1),
        ("int8", (10, 0), 1, False, 1),
    ],
)
def test_codes_are_copied_ahead_where_a_barrier_does_not_hold_loads_together(
    format: str, capability: tuple[int, int], rows: int, spreads: bool, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled, "capability", lambda _device: capability)
    monkeypatch.setattr(scaled, "SPREADS_LOADS", spreads)
    found = scaled.copied_ahead(LAUNCH, make(format, group=64), rows, torch.device("cpu"))
    assert found == replace(LAUNCH, num_stages=stages)
    deeper = replace(LAUNCH, num_stages=4)
    assert scaled.copied_ahead(deeper, make(format, group=64), rows, torch.device("cpu")) == deeper


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_tiles_that_are_copied_ahead(format: str, rows: int, device: torch.device) -> None:
    """More stages than blocks of channels, and the other way round; skipped codes may not be copied either."""
    weight, tau = moved(make(format, (320, 64), 64), device), torch.tensor([0.8], device=device)
    x = torch.randn(rows, 320, device=device).to(torch.bfloat16 if rows > 1 else torch.float32)
    expected, codes = exact(x, weight, [tau]), weight.codes.clone()
    codes.view(torch.uint8)[~keep_mask(x, tau).any(0)] = 0x7F
    for stages, splits in ((3, 1), (4, 2), (3, 5)):
        launch = replace(LAUNCH, num_stages=stages, splits=splits, block_in=32)
        for run in kernels(rows):
            assert_near(run(x, replace(weight, codes=codes), tau, launch=launch), expected)


@pytest.mark.parametrize("inputs", [128, 1500, 2100])
@pytest.mark.parametrize("kept", [0, 1, 16, 17, 64, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_lists_of_any_length(format: str, kept: int, inputs: int, device: torch.device) -> None:
    """Turns of LANES channels are left out after the last kept one; blocks of a list beyond the inputs hold nothing."""
    weight, tau = moved(make(format, (inputs, 64), 128, zeros=format == "int4"), device), torch.tensor([0.5])
    x = torch.zeros(1, inputs, device=device)
    for start in range(0, inputs, 128):
        chosen = start + torch.randperm(min(128, inputs - start))[:kept]
        x[0, chosen] = torch.randn(len(chosen), device=device).sign() * (0.6 + torch.rand(len(chosen), device=device))
    launch = replace(LAUNCH, kernel="compaction", block_in=128)
    y = scaled_compaction.sparse_linear(x, weight, tau.to(device), launch=launch)
    assert_near(y, exact(x, weight, [tau.to(device)]))


@pytest.mark.parametrize("format", FORMATS)
def test_the_launch_says_which_kernel_runs(format: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    weight, tau = moved(make(format, (64, 32), 32), device), torch.tensor([0.5], device=device)
    x, ran = torch.randn(1, 64, device=device).bfloat16(), []
    for module in (scaled, scaled_compaction):
        run = module.sparse_linear
        spied = lambda *given, run=run, name=module.__name__, **more: (ran.append(name), run(*given, **more))[1]  # noqa: E731
        monkeypatch.setattr(module, "sparse_linear", spied)
    cuda.kernel_of.cache_clear()
    for kernel in configs.KERNELS:
        launch = replace(LAUNCH, kernel=kernel, block_in=32)
        monkeypatch.setattr(cuda, "choose", lambda *_, launch=launch: launch)
        assert_near(cuda.sparse_linear_scaled(x, weight, tau), exact(x, weight, [tau]))
    cuda.kernel_of.cache_clear()
    assert ran == [scaled.__name__, scaled_compaction.__name__]


@pytest.mark.parametrize("kind", ["one", "shards-channels"])
@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=needs_cuda), pytest.param(8, marks=needs_cuda)])
@pytest.mark.parametrize("format", FORMATS)
def test_another_x_and_threshold_through_the_operator(format: str, rows: int, kind: str, device: torch.device) -> None:
    """On a GPU in one CUDA graph, as a server replays it; the mask is never part of the graph."""
    inputs, sizes = (128, [32, 16]) if device.type == "cpu" else (2048, [1024, 512])
    weight = moved(make(format, (inputs, sum(sizes)), 128, scale=torch.bfloat16), device)
    x = torch.randn(rows, inputs, device=device).bfloat16()
    sharded = kind == "shards-channels"
    tau = torch.full((2, inputs) if sharded else (1,), 0.5, device=device)
    run = partial(cuda.sparse_linear_scaled if device.type == "cpu" else sparse_linear, x, weight, tau)
    y = run(shard_sizes=sizes if sharded else None)
    graph = torch.cuda.CUDAGraph() if device.type == "cuda" else None
    if graph is not None:
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = run(shard_sizes=sizes if sharded else None)
    for factor in (0.0, 2.0):
        x.copy_(torch.randn_like(x))
        tau.fill_(0.5 * factor).mul_(1 + torch.rand_like(tau))
        if graph is None:
            y = run(shard_sizes=sizes if sharded else None)
        else:
            graph.replay()
        limits = list(tau) if sharded else [tau]
        assert_near(y, exact(x, weight, limits, None, sizes if sharded else None))


@needs_cuda
@pytest.mark.parametrize("shape", [(4096, 6144), (14336, 4096), (576, 1536)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("format", FORMATS)
def test_shipped_launches_at_real_sizes(format: str, rows: int, shape: tuple[int, int], device: torch.device) -> None:
    group = 0 if format != "int4" else 64 if shape[0] == 576 else 128
    weight = moved(make(format, shape, group, scale=torch.bfloat16), device)
    x, tau = torch.randn(rows, shape[0], device=device).bfloat16(), torch.tensor([0.67], device=device)
    expected = exact(x, weight, [tau])
    masked = ~keep_mask(x, tau).any(0)
    weight.codes.view(torch.uint8)[masked] = 0x7F
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "another"):
        launch = configs.choose(name, format, *shape, rows)
        assert launch is not None
        for one in (launch, replace(launch, num_stages=3)) if rows == 1 else (launch,):
            for run in kernels(rows):
                assert_near(run(x, weight, tau, launch=one), expected)
