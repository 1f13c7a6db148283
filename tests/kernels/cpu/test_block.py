# SPDX-License-Identifier: Apache-2.0
"""What lies between a block's linears, compiled: held to plain PyTorch over dtypes, odd shapes, numbers of threads."""

import pytest
import torch

from spon_plugin.kernels import block_reference as reference
from spon_plugin.kernels.cpu import block
from spon_plugin.kernels.cpu import block_layout as fields
from spon_plugin.kernels.cpu.kernel import is_available
from spon_plugin.kernels.cpu.program import Program
from spon_plugin.masking import deviation

pytestmark = pytest.mark.skipif(not is_available(), reason="needs Numba and GNU's OpenMP")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUARD = 64  # elements behind what a stage may write, which have to stay


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def guarded(*shape, dtype=torch.float32):
    """A tensor, and what lies behind it."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + GUARD,), 7.0, dtype=dtype)
    return whole[:size].view(shape), whole[size:]


def close(found, expected, dtype):
    """As close as a rounding of the dtype is, or as sums in another order are."""
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, size", [(1, 1), (1, 7), (1, 576), (9, 64), (3, 4100)])
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "after a sum"])
def test_norm(dtype, rows, size, adds, threads):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, size).to(dtype), torch.randn(size).to(dtype)
    delta = torch.randn(rows, size).to(dtype) if adds else None
    (total, behind_total), (out, behind) = guarded(rows, size, dtype=dtype), guarded(rows, size, dtype=dtype)
    Program([block.norm(x, delta, weight, 1e-5, total, out)]).run()
    expected_total, expected = reference.add_norm(x, delta, weight, 1e-5)
    close(out, expected, dtype)
    assert not adds or torch.equal(total, expected_total)
    assert bool((behind == 7).all()) and bool((behind_total == 7).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 63, 64, 1536, 9001])
def test_gate(dtype, size, threads):
    torch.manual_seed(0)
    gate, up = (8 * torch.randn(size)).to(dtype), torch.randn(size).to(dtype)
    gate[: min(size, 6)] = torch.tensor([200.0, -200.0, 0.0, -0.0, float("nan"), 88.0])[:size].to(dtype)
    out, behind = guarded(size, dtype=dtype)
    scratch, behind_scratch = guarded(block.gate_words(threads))
    Program([block.gate(gate, up, out, scratch)]).run()
    close(out, reference.gated(gate, up), dtype)
    assert bool((behind == 7).all()) and bool((behind_scratch == 7).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 65, 4864])
def test_centres_are_taken_off_and_sums_made(dtype, size, threads):
    torch.manual_seed(0)
    x, center, other = torch.randn(size).to(dtype), torch.randn(size), torch.randn(size).to(dtype)
    (out, behind), (total, behind_total) = guarded(size, dtype=dtype), guarded(size, dtype=dtype)
    Program([block.deviate(x, center, out), block.add(x, other, total)]).run()
    assert torch.equal(out, deviation(x, center))
    assert torch.equal(total, x + other)
    assert bool((behind == 7).all()) and bool((behind_total == 7).all())


def attend(q, k, v, cos, sin, keys, values, length, scale, threads):
    """`block.attend` as `layers.block_program` runs it; the output, and what lies behind it and behind the scratch."""
    size, capacity = keys.shape[-1], keys.shape[-2]
    out, behind = guarded(q.numel(), dtype=q.dtype)
    scratch, behind_scratch = guarded(block.attend_words(threads, size, length + 1))
    program = Program([block.attend(q, k, v, size, scale, out)])
    addresses = [tensor.data_ptr() for tensor in (cos, sin, keys, values, scratch)]
    names = (fields.COS, fields.SIN, fields.KEYS, fields.VALUES, fields.SCRATCH, fields.CAPACITY, fields.LENGTH)
    for name, value in zip(names, (*addresses, capacity, length), strict=True):
        program.words[program.place(0, name)] = value
    program.run()
    return out, torch.cat((behind.float(), behind_scratch))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads, size", [(1, 1, 2), (9, 3, 64), (14, 2, 64), (4, 4, 30), (8, 1, 128)])
@pytest.mark.parametrize("length, capacity", [(0, 1), (1, 5), (130, 131), (700, 1000)])
def test_attention(dtype, heads, kv_heads, size, length, capacity, threads):
    torch.manual_seed(0)
    q, k, v = (torch.randn(n * size).to(dtype) for n in (heads, kv_heads, kv_heads))
    angles = torch.rand(size // 2).repeat(2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = torch.randn(2, kv_heads, capacity, size).to(dtype)
    keys[:, length + 1 :], values[:, length + 1 :] = float("nan"), float("nan")  # not written yet, not to be read
    before, own = (keys.clone(), values.clone()), (keys.clone(), values.clone())
    found, behind = attend(q, k, v, cos, sin, *own, length, size**-0.5, threads)
    expected = reference.attend(q, k, v, cos, sin, keys, values, length, size**-0.5)
    close(found, expected, dtype)
    for tensor, wanted, old in zip(own, (keys, values), before, strict=True):
        close(tensor[:, length], wanted[:, length], dtype)
        assert torch.equal(tensor[:, :length], old[:, :length])
        assert tensor[:, length + 1 :].isnan().all()
    assert bool((behind == 7).all())


@pytest.mark.parametrize("what", ["query", "key", "value", "a key before"])
def test_attention_shows_nan(what):
    torch.manual_seed(0)
    q, k, v, cos, sin = torch.randn(16), torch.randn(8), torch.randn(8), torch.ones(8), torch.zeros(8)
    keys, values = torch.randn(2, 1, 9, 8)
    {"query": q, "key": k, "value": v, "a key before": keys[0, 3]}[what][0] = float("nan")
    found, _ = attend(q, k, v, cos, sin, keys.clone(), values.clone(), 5, 1.0, torch.get_num_threads())
    expected = reference.attend(q, k, v, cos, sin, keys, values, 5, 1.0)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.isnan().any()


def test_large_scores_are_no_overflow():
    q, k, v, cos, sin = torch.full((2,), 100.0), torch.zeros(2), torch.ones(2), torch.ones(2), torch.zeros(2)
    keys = torch.tensor([[[9.0, 9.0], [8.5, 8.5], [0.0, 0.0]]])  # scores of 1800, 1700 and 0
    values = torch.tensor([[[5.0, 6.0], [7.0, 8.0], [0.0, 0.0]]])
    found, _ = attend(q, k, v, cos, sin, keys, values, 2, 1.0, torch.get_num_threads())
    assert torch.equal(found, torch.tensor([5.0, 6.0]))


def test_attention_is_the_same_on_any_number_of_threads():
    torch.manual_seed(0)
    q, k, v, cos, sin = torch.randn(576), torch.randn(192), torch.randn(192), torch.randn(64), torch.randn(64)
    keys, values = torch.randn(2, 3, 300, 64)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(attend(q, k, v, cos, sin, keys.clone(), values.clone(), 299, 0.125, threads)[0])
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
