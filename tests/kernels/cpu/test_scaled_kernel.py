# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels for weights with scales, against the decoded weight in float64."""

from dataclasses import replace

import pytest
import torch

from spon_plugin import SponError
from spon_plugin.kernels import decoded, sparse_linear
from spon_plugin.kernels.cpu import decode, scaled
from spon_plugin.kernels.cpu.kernel import is_available
from spon_plugin.kernels.cpu.scaled_layout import INTEGERS, SUM_INT4_AVX512_VNNI, SUM_INT4_PORTABLE
from spon_plugin.kernels.table import KERNELS, Problem, choose, reasons
from spon_plugin.masking import keep_mask, sparsify
from spon_plugin.weights.dense import DenseWeight
from spon_plugin.weights.fp8 import Fp8Weight
from spon_plugin.weights.int4 import Int4Weight, pack_nibbles
from spon_plugin.weights.int8 import Int8Weight

decode_rows = decode.rows
processor = pytest.importorskip("spon_plugin.kernels.cpu.processor", exc_type=ImportError)
pytestmark = pytest.mark.skipif(not is_available(), reason="needs Numba and GNU's OpenMP")

# Kind -> format, arguments, and how far an output may be off, in relation to all: float32 sums; inputs of eight bits,
# a rounding error of 1/254 of the largest in a run, which is about three times the usual one.
KINDS = {
    "int8": ("int8", {}, 1e-6),
    "fp8": ("fp8", {}, 1e-6),
    "int4 exact": ("int4", {"exact": True}, 1e-6),
    "int4": ("int4", {}, 0.01),
    "int4 portable": ("int4", {"integers": "int4-portable"}, 0.01),
}
SHAPES = [(256, 192), (300, 77), (1, 1), (130, 514), (64, 2)]


def make(
    format, shape, group=64, zeros=False, offsets=False, scale=torch.float32, act_order=False, dtype=torch.float8_e4m3fn
):
    torch.manual_seed(0)
    inputs, outputs = shape
    groups = -(-inputs // group)
    scales = (torch.rand(groups, outputs) * 0.1 + 0.01).to(scale)
    given = torch.randn(groups, outputs) * 0.1 if offsets else None
    order = (torch.arange(inputs) // group)[torch.randperm(inputs)].to(torch.int32) if act_order else None
    if format == "fp8":
        return Fp8Weight(torch.randn(shape).to(dtype), scales, None, group, order, given)
    if format == "int8":
        zero = torch.randint(-9, 9, (groups, outputs)).to(torch.int8) if zeros else None
        return Int8Weight(torch.randint(-128, 128, shape).to(torch.int8), scales, zero, group, order, given)
    zero = torch.randint(0, 16, (groups, outputs)).to(torch.uint8) if zeros else None
    return Int4Weight(pack_nibbles(torch.randint(0, 16, shape)), scales, zero, group, order, given)


def truth(x, weight, thresholds, bias=None, sizes=None):
    sizes = sizes or [weight.out_features]
    columns = weight.dense().double().split(sizes, 1)
    parts = [sparsify(x, tau).double() @ part for tau, part in zip(thresholds, columns, strict=True)]
    y = torch.cat(parts, -1)
    return y if bias is None else y + bias.double()


def check(y, expected, bound):
    error = (y.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= max(bound, {torch.float32: 0, torch.bfloat16: 4e-3, torch.float16: 5e-4}[y.dtype]), error


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_batches(kind, batch, shape):
    format, options, bound = KINDS[kind]
    weight = make(format, shape)
    x, tau, bias = torch.randn(batch, shape[0]), torch.tensor([0.5]), torch.randn(shape[1])
    check(scaled.sparse_linear(x, weight, tau, bias, **options), truth(x, weight, [tau], bias), bound)


@pytest.mark.parametrize("order", [False, True], ids=["runs", "act-order"])
@pytest.mark.parametrize("offsets", [False, True], ids=["no offsets", "offsets"])
@pytest.mark.parametrize("zeros", [False, True], ids=["no zeros", "zeros"])
@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_decoded_as_the_weight_says(shape, format, zeros, offsets, order):
    weight = make(format, shape, zeros=zeros, offsets=offsets, act_order=order, scale=torch.bfloat16)
    for first, stop in ((0, shape[0]), (shape[0] // 3, shape[0] // 2 + 1), (shape[0] - 1, shape[0] + 9)):
        expected = weight.rows(slice(first, stop)).float()
        torch.testing.assert_close(decode.rows(weight, first, stop), expected, rtol=1e-6, atol=1e-7)


def test_many_rows_are_multiplied_with_what_the_kernel_decodes(monkeypatch):
    weight, x, seen = make("int4", (300, 96)), torch.randn(20, 300), []
    monkeypatch.setattr(decoded.panels, "why_not", lambda x, weight: "not here")
    monkeypatch.setattr(decoded.decode, "rows", lambda *a: seen.append(a[1:]) or decode_rows(*a))
    monkeypatch.setattr(decoded, "chunk_elements", lambda device: 96 * 128)
    check(sparse_linear(x, weight, torch.tensor([0.5])), truth(x, weight, [torch.tensor([0.5])]), 1e-6)
    assert seen == [(0, 128), (128, 256), (256, 384)]


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_longer_than_a_tile(kind, batch, zeros):
    format, options, bound = KINDS[kind]
    # An odd number of outputs: the other half of the last byte is none, whatever it holds.
    weight, x, tau = make(format, (96, 2 * 8192 + 71), 32, zeros), torch.randn(batch, 96), torch.tensor([0.5])
    if weight.unit == 2:
        weight.codes[:, -1] |= 0xF0
    check(scaled.sparse_linear(x, weight, tau, **options), truth(x, weight, [tau]), bound)


@pytest.mark.parametrize("group", [16, 32, 128, 320])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("offsets", [False, True], ids=["", "offsets"])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_zero_points_and_offsets(kind, offsets, zeros, group):
    format, options, bound = KINDS[kind]
    weight, x, tau = make(format, (320, 96), group, zeros, offsets), torch.randn(3, 320), torch.tensor([0.7])
    check(scaled.sparse_linear(x, weight, tau, **options), truth(x, weight, [tau]), bound)


@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind, dtype, scale):
    format, options, bound = KINDS[kind]
    weight, x, tau = make(format, (192, 128), scale=scale), torch.randn(2, 192).to(dtype), torch.tensor([0.5])
    y = scaled.sparse_linear(x, weight, tau, torch.randn(128).to(dtype) * 0, **options)
    assert y.dtype == dtype
    check(y, truth(x, weight, [tau]), bound)


@pytest.mark.parametrize("per_channel", [False, True], ids=["scalar", "per channel"])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_have_thresholds_of_their_own(kind, per_channel):
    format, options, bound = KINDS[kind]
    weight, x, sizes = make(format, (256, 130), zeros=True, offsets=True), torch.randn(2, 256), [64, 32, 34]
    taus = torch.rand(3, 256) if per_channel else torch.tensor([0.2, 0.9, 0.5])
    y = scaled.sparse_linear(x, weight, taus, shard_sizes=sizes, **options)
    check(y, truth(x, weight, list(taus.view(3, -1)), None, sizes), bound)


@pytest.mark.parametrize("kind", KINDS)
def test_act_order(kind):
    format, options, bound = KINDS[kind]
    weight, x, tau = make(format, (256, 96), zeros=True, act_order=True), torch.randn(3, 256), torch.rand(256)
    check(scaled.sparse_linear(x, weight, tau, **options), truth(x, weight, [tau]), bound)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_weight_is_read_in_place(kind):
    format, options, bound = KINDS[kind]
    whole, x, tau = make(format, (256, 192), zeros=True, offsets=True), torch.randn(2, 256), torch.tensor([0.5])
    part = whole.shard(64, 128)
    assert not scaled.why_not(part) and part.codes.data_ptr() != whole.codes.data_ptr()
    check(scaled.sparse_linear(x, part, tau, **options), truth(x, part, [tau]), bound)


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_codes_and_scales_are_not_read(kind):
    """Rows that no token keeps hold the largest codes or NaN, scales of groups that nobody keeps NaN: none may show."""
    format, options, bound = KINDS[kind]
    weight, tau = make(format, (512, 128)), torch.tensor([0.8])
    x = torch.randn(2, 512)
    x[:, 64:192] = 0.1  # two groups that are skipped whole
    skipped = ~keep_mask(x, tau).any(0)
    expected = truth(x, weight, [tau])
    codes, scales = weight.codes.clone(), weight.scales.clone()
    codes.view(torch.uint8)[skipped] = 0x7F
    scales[1:3] = torch.nan
    poisoned = replace(weight, codes=codes, scales=scales)
    check(scaled.sparse_linear(x, poisoned, tau, **options), expected, bound)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_no_numbers_show_in_their_own_row(kind, value):
    format, options, bound = KINDS[kind]
    weight, x, tau = make(format, (256, 96)), torch.randn(3, 256), torch.tensor([0.5])
    x[1, 200] = value
    y = scaled.sparse_linear(x, weight, tau, **options)
    assert not y[1].isfinite().any()
    rest = torch.tensor([0, 2])
    check(y[rest], truth(x[rest], weight, [tau]), bound)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_kept_and_tiny_inputs(kind):
    format, options, _ = KINDS[kind]
    weight, bias = make(format, (256, 96)), torch.randn(96)
    x = torch.randn(2, 256)
    assert torch.equal(scaled.sparse_linear(x, weight, torch.tensor([9.0]), bias, **options), bias.expand(2, -1))
    tiny = scaled.sparse_linear(x * 1e-40, weight, torch.tensor([0.0]), bias, **options)
    torch.testing.assert_close(tiny, bias.expand(2, -1))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_call_gives_the_same_bits(kind, threads):
    format, options, bound = KINDS[kind]
    weight, x, tau = make(format, (448, 224)), torch.randn(1, 448), torch.tensor([0.4])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (scaled.sparse_linear(x, weight, tau, **options) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first, second)
    check(first, truth(x, weight, [tau]), bound)


@pytest.mark.parametrize("rows", [3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_unmasked_rows_have_the_bits_that_they_have_alone(kind, rows):
    format, options, _ = KINDS[kind]
    weight, none, x = make(format, (130, 514), zeros=format != "fp8"), torch.full((1,), -1.0), torch.randn(rows, 130)
    x[0, ::3] = 0
    alone = [scaled.sparse_linear(row[None], weight, none, **options) for row in x]
    assert torch.equal(scaled.sparse_linear(x, weight, none, **options), torch.cat(alone))


@pytest.mark.parametrize("order", [False, True], ids=["runs", "act-order"])
@pytest.mark.parametrize("shape", [(512, 300), (130, 514), (37, 66), (7, 2 * 8192 + 70)], ids=str)
def test_instructions_give_the_same_bits(shape, order):
    """Runs here of any length, not of four rows alone; what the processor lacks is computed in the same places."""
    weight, x = make("int4", shape, zeros=True, act_order=order), torch.randn(3, shape[0])
    x[2] *= 100
    kinds = [kind for kind in INTEGERS if processor.runs(kind)]
    y = {kind: scaled.sparse_linear(x, weight, torch.tensor([0.5]), integers=kind) for kind in kinds}
    portable = y.pop(SUM_INT4_PORTABLE)
    for one in y.values():
        assert torch.equal(one, y[SUM_INT4_AVX512_VNNI])
        torch.testing.assert_close(one, portable, rtol=1e-5, atol=1e-5 * float(portable.abs().max()))


def test_instructions_are_chosen_by_what_the_processor_has(monkeypatch):
    weight = make("int4", (64, 32))
    for having, kind in (
        ({"avx2", "avx512vnni", "avx512bw", "avx512vl", "avxvnni"}, "int4-avx512vnni"),
        ({"avx2", "avxvnni"}, "int4-avxvnni"),
        ({"avx2", "avx512vnni"}, "int4-avx2"),
        ({"sse4.2"}, "int4-portable"),
    ):
        monkeypatch.setattr(processor, "features", lambda having=having: having)
        assert scaled.sums_of(weight) == kind
        assert scaled.sums_of(make("int8", (64, 32))) == "int8"


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_every_float8_and_every_code(format):
    """All 256 bytes in a row: each output is one code times its scale."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    weight = {
        "int8": lambda: Int8Weight(codes.view(torch.int8), torch.ones(1, 256), None, 2),
        "int4": lambda: Int4Weight(codes, torch.ones(1, 512), None, 2),
        "fp8": lambda: Fp8Weight(codes.view(torch.float8_e4m3fn), torch.ones(1, 256), None, 2),
    }[format]()
    y = scaled.sparse_linear(torch.tensor([[1.0, 0.0]]), weight, torch.tensor([0.5]), exact=True)
    torch.testing.assert_close(y[0], weight.dense()[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("rows", [1, 8, 9, 40])
def test_the_operator_for_any_number_of_rows(format, rows):
    weight, tau = make(format, (256, 96), zeros=format != "fp8"), torch.tensor([0.5])
    x, bias = torch.randn(rows, 256), torch.randn(96)
    y = sparse_linear(x.view(rows, 1, 256), weight, tau, bias)
    assert y.shape == (rows, 1, 96)
    check(y.view(rows, 96), truth(x, weight, [tau], bias), 0.01)
    opaque = torch.compile(lambda x: sparse_linear(x, weight, tau, bias), backend="eager", fullgraph=True)
    assert torch.equal(opaque(x.view(rows, 1, 256)), y)


@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_rows_that_lie_half_a_page_apart_are_arranged_with_a_line_between_them(format, rows):
    outputs = 4096 if format == "int4" else 2048
    weight, tau = make(format, (96, outputs)), torch.tensor([0.5])
    arranged = weight.arranged()
    assert weight.codes.stride() == (2048, 1) and arranged.codes.stride() == (2048 + 64, 1)
    assert torch.equal(arranged.dense(), weight.dense())
    assert arranged.arranged().codes is arranged.codes
    part = make(format, (96, 2 * outputs)).shard(0, outputs).arranged()
    assert part.codes.stride() == (2048 + 64, 1) and part.codes.untyped_storage().nbytes() == 96 * (2048 + 64)
    x, bias = torch.randn(rows, 96), torch.randn(outputs)
    assert choose(Problem(x, arranged)).name == ("cpu scaled" if rows < 9 else "decoded")
    check(sparse_linear(x, arranged, tau, bias), truth(x, weight, [tau], bias), 0.01)
    assert torch.equal(sparse_linear(x, arranged, tau, bias), sparse_linear(x, weight, tau, bias))


@pytest.mark.parametrize("outputs", [2050, 96])
def test_other_rows_are_arranged_as_they_are(outputs):
    weight = make("int8", (96, outputs))
    assert weight.arranged().codes is weight.codes


@pytest.mark.parametrize("act_order", [False, True], ids=["", "act-order"])
@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_opcheck(format, act_order):
    w = make(format, (64, 24), zeros=format != "fp8", act_order=act_order)
    parts = (w.codes, w.scales, w.zeros, w.group_size, w.group_of_row, w.offsets, w.format)
    x, bias = torch.randn(3, 64, requires_grad=True), torch.randn(24, requires_grad=True)
    operator = torch.ops.spon.sparse_linear_rows.default
    # The test of the schema multiplies what it is given, which torch cannot for float8.
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    tests += ["test_schema"] if format != "fp8" else []
    torch.library.opcheck(operator, (x, *parts, torch.tensor([0.5]), bias, None, True), test_utils=tests)


@pytest.mark.parametrize("size", [32, 64, 128, 1024])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
def test_four_bits_in_integers_and_on_request_in_float32(size, zeros):
    """The error is the rounding's, 1/254 of the largest input of a run; in float32 that of some hundred products."""
    weight, tau = make("int4", (1024, 256), size, zeros), torch.tensor([0.6])
    x = torch.randn(1, 1024)
    expected = truth(x, weight, [tau])
    errors = [
        ((sparse_linear(x, weight, tau, exact=exact).double() - expected).norm() / expected.norm()).item()
        for exact in (False, True)
    ]
    assert 1e-4 < errors[0] < 0.01 and errors[1] < 3e-6


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_gradients_are_those_of_the_kept_inputs(format):
    weight, tau = make(format, (64, 24)), torch.tensor([0.5])
    x, bias, grad = torch.randn(3, 64, requires_grad=True), torch.randn(24, requires_grad=True), torch.randn(3, 24)
    sparse_linear(x, weight, tau, bias).backward(grad)
    expected = (grad @ weight.dense().t()) * keep_mask(x, tau)
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(bias.grad, grad.sum(0))


def test_the_table_says_why():
    weight, x = make("int4", (256, 96)), torch.randn(2, 256)
    across = replace(weight, codes=weight.codes.t().contiguous().t())
    assert choose(Problem(x, weight)).name == "cpu scaled"
    for problem, reason in (
        (Problem(torch.randn(9, 256), weight), "for 1 to 8 rows, not 9"),
        (Problem(torch.randn(0, 256), weight), "for 1 to 8 rows, not 0"),
        (Problem(x, weight, [33, 63]), "shards that begin within a byte"),
        (Problem(x.double(), weight), "for float32, bfloat16 and float16, not torch.float64"),
        (Problem(x, across), "codes that do not lie by inputs: call arranged() once"),
        (Problem(x, replace(weight, scales=weight.scales.double())), "scales of torch.float64"),
        (Problem(x, replace(weight, scales=weight.scales.int())), "scales of torch.int32"),
    ):
        assert choose(problem).name == "decoded"
        assert reasons(problem)["cpu scaled"] == reason
    assert choose(Problem(x, across.arranged())).name == "cpu scaled"
    assert choose(Problem(x, DenseWeight(torch.randn(256, 96)))).name == "cpu"
    assert choose(Problem(x, make("fp8", (256, 96), dtype=torch.float8_e5m2))).name == "decoded"
    assert {format for kernel in KERNELS if kernel.device == "any" for format in kernel.formats} == {
        "dense", "int8", "int4", "fp8",
    }, "every format has a kernel for any device and any number of rows"  # fmt: skip


@pytest.mark.parametrize("lies", [lambda m: m, lambda m: m.t().contiguous().t(), torch.Tensor.double])
def test_dense_weights_in_any_layout(lies):
    matrix, x, tau = torch.randn(64, 24), torch.randn(3, 64), torch.tensor([0.5])
    y = sparse_linear(x, DenseWeight(lies(matrix)), tau)
    check(y, sparsify(x, tau).double() @ matrix.double(), 1e-6)


@pytest.mark.parametrize("sizes", [[33, 63], [96]], ids=str)
def test_what_no_kernel_takes_is_decoded(sizes):
    weight, x = make("int4", (256, 96), zeros=True), torch.randn(2, 256)
    taus = torch.tensor([0.3, 0.8][: len(sizes)])
    y = sparse_linear(x, replace(weight, codes=weight.codes.t().contiguous().t()), taus, shard_sizes=sizes)
    check(y, truth(x, weight, list(taus.view(-1, 1)), None, sizes), 1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda w: (torch.randn(2, 7), w, torch.zeros(1)), r"x: got 'shape \(2, 7\)', expected \[..., 256\]"),
        (lambda w: (torch.randn(2, 256), w, torch.zeros(5)), "threshold: got"),
        (lambda w: (torch.randn(2, 256), w, torch.zeros(1), torch.zeros(7)), "bias: got"),
    ],
    ids=["x", "threshold", "bias"],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(SponError, match=message):
        sparse_linear(*arguments(make("int4", (256, 96))))


@pytest.mark.parametrize(
    "wrong",
    [
        {"codes": torch.zeros(256, 96, dtype=torch.uint8)},
        {"zeros": torch.zeros(1, 96, dtype=torch.uint8)},
        {"offsets": torch.zeros(4, 95)},
        {"group_of_row": torch.zeros(255, dtype=torch.int32)},
        {"group_size": 32},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_parts_of_a_weight_that_do_not_fit_are_named(wrong):
    with pytest.raises(SponError, match=f"^{next(iter(wrong))}: got"):
        sparse_linear(torch.randn(2, 256), replace(make("int4", (256, 96)), **wrong), torch.zeros(1))


@pytest.mark.parametrize("what", ["threshold", "bias", "scales"])
@pytest.mark.parametrize("how", ["another tensor", "the same tensor elsewhere"])
def test_a_known_call_is_settled_anew_when_what_it_was_told_has_moved(what, how):
    weight, x = make("int8", (64, 32)), torch.randn(1, 64)
    given = {"threshold": torch.tensor([0.2]), "bias": torch.zeros(32), "scales": weight.scales}
    first = sparse_linear(x, weight, given["threshold"], given["bias"])
    assert torch.equal(sparse_linear(x, weight, given["threshold"], given["bias"]), first)
    moved = given[what] * 2 + 1
    if how == "another tensor":
        given[what] = moved
        weight = replace(weight, scales=given["scales"])
    else:
        given[what].data = moved
    y = sparse_linear(x, weight, given["threshold"], given["bias"])
    assert not torch.equal(y, first)
    check(y, truth(x, weight, [given["threshold"]], given["bias"]), 1e-6)


@pytest.mark.parametrize("what", ["threshold", "bias"])
def test_a_known_call_is_not_that_of_a_vector_with_gaps_at_the_same_place(what):
    weight, x = make("int8", (32, 32)), torch.randn(1, 32)
    long = torch.rand(64)
    for vector in (long[:32], long[::2]):
        given = {"threshold": torch.tensor([0.2]), "bias": torch.zeros(32), what: vector}
        y = sparse_linear(x, weight, given["threshold"], given["bias"])
        check(y, truth(x, weight, [given["threshold"]], given["bias"]), 1e-6)
