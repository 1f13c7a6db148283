# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from spon_plugin import SponError, keep_mask, sparsify
from spon_plugin.masking import check_sparsity, choose_rows, deviation, sparse_deviation, zero_dropped


def threshold(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32)


def test_an_entry_at_the_threshold_is_dropped_and_one_above_is_kept():
    x = torch.tensor([0.5, -0.5, 0.5000001, -0.6, 0.0])
    assert keep_mask(x, threshold(0.5)).tolist() == [False, False, True, True, False]
    assert sparsify(x, threshold(0.5)).tolist() == pytest.approx([0, 0, 0.5000001, -0.6, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_zero_threshold_changes_nothing(dtype):
    x = torch.randn(7, 33, dtype=dtype)
    assert torch.equal(sparsify(x, threshold(0)), x)
    assert sparsify(x, threshold(0)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(dtype):
    x = torch.tensor([0.1], dtype=dtype)
    # Just below the stored value: rounded to x.dtype the threshold would equal it, and the entry would be dropped.
    assert keep_mask(x, x.float() - 1e-6).item()
    assert not keep_mask(x, x.float()).item()


def test_nan_and_infinity_stay_visible():
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.1])
    out = sparsify(x, threshold(1e30))
    assert out.isnan().tolist() == [True, False, False, False]
    assert out[1:].tolist() == [float("inf"), float("-inf"), 0]
    out = sparsify(x, threshold(1e30), None, torch.ones(4))
    assert out.isnan().tolist() == [True, False, False, False]
    assert out[1:].tolist() == [float("inf"), float("-inf"), 1]


def test_a_vector_threshold_works_per_channel():
    x = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    assert sparsify(x, torch.tensor([0.5, 2.0])).tolist() == [[1, 0], [3, 3]]


def test_a_centre_takes_the_place_of_what_is_masked():
    x, center = torch.tensor([1.0, 2.5, -2.0, 3.0]), torch.tensor([1.5, 1.0, -2.0, 0.0])
    assert keep_mask(x, threshold(0.5), center).tolist() == [False, True, False, True]
    assert sparsify(x, threshold(0.5), None, center).tolist() == [1.5, 2.5, -2.0, 3.0]
    assert sparse_deviation(x, threshold(0.5), None, center).tolist() == [0, 1.5, 0, 3.0]


def test_a_centre_of_zero_is_none():
    x = torch.randn(5, 8)
    for function in (keep_mask, lambda *a: sparsify(*a[:2], None, *a[2:])):
        assert torch.equal(function(x, threshold(0.5), torch.zeros(8)), function(x, threshold(0.5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_with_a_centre_the_layer_masks_what_its_kernel_masks(dtype):
    """The kernel gets ``x - center`` in x's dtype and compares that; so does the rule."""
    torch.manual_seed(0)
    x, center, tau = torch.randn(64, 33).to(dtype), torch.randn(33), torch.rand(33)
    assert deviation(x, center).dtype == dtype
    assert torch.equal(keep_mask(x, tau, center), keep_mask(deviation(x, center), tau))
    assert sparsify(x, tau, None, center).dtype == sparse_deviation(x, tau, None, center).dtype == dtype
    if dtype == torch.float64:
        whole = sparse_deviation(x, tau, None, center) + center
        torch.testing.assert_close(whole, sparsify(x, tau, None, center), rtol=0, atol=1e-15)


def test_a_small_centre_is_taken_off_in_float32():
    # 0.1 in bfloat16 is 0.1001; a centre rounded likewise would differ by 4e-4.
    x, center = torch.tensor([0.1]).bfloat16(), torch.tensor([0.1])
    assert deviation(x, center).item() == pytest.approx(x.item() - 0.1, rel=0.01)


def test_dense_tokens_keep_their_whole_input():
    x = torch.full((2, 3, 4), 0.1)
    dense = torch.tensor([[True, False, False], [False, False, True]])
    assert sparsify(x, threshold(1), dense).ne(0).any(-1).tolist() == dense.tolist()
    center = torch.full((4,), 0.3)
    assert sparsify(x, threshold(1), dense, center).eq(0.1).all(-1).tolist() == dense.tolist()
    assert sparse_deviation(x, threshold(1), dense, center)[dense].eq(0.1).all()
    assert not sparse_deviation(x, threshold(1), dense, center)[~dense].any()


def test_gradient_flows_through_kept_entries_only():
    x = torch.tensor([0.1, 2.0, -3.0], requires_grad=True)
    sparsify(x, threshold(1)).sum().backward()
    assert x.grad.tolist() == [0, 1, 1]


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, 50, float("nan"), "half", None, True])
def test_a_bad_sparsity_is_named(value):
    with pytest.raises(SponError, match=r"sparsity: got .*expected a number in \[0, 1\)"):
        check_sparsity(value)


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 0.999])
def test_a_good_sparsity_is_returned(value):
    assert check_sparsity(value) == value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dropping_and_choosing_are_torch_where_with_its_gradients(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 33, generator=generator).to(dtype).requires_grad_()
    other = torch.randn(2, 5, 33, generator=generator).to(dtype).requires_grad_()
    keep = torch.rand(2, 5, 33, generator=generator) < 0.5
    for mask in (keep, keep[:1], keep[0, 0], torch.zeros_like(keep), torch.ones_like(keep)):
        same(zero_dropped(x, mask), torch.where(mask, x, 0), x)
    for dense in (
        keep[..., 0],
        keep[:1, :, 0],
        torch.zeros(2, 5, dtype=torch.bool),
        torch.ones(1, 5, dtype=torch.bool),
    ):
        same(choose_rows(dense, x, other), torch.where(dense.unsqueeze(-1), x, other), x, other)
    assert choose_rows(None, x, other) is other


def same(made, expected, *inputs):
    assert made.dtype == expected.dtype and torch.equal(made, expected)
    weight = torch.linspace(-1, 1, made.numel(), dtype=made.dtype).view_as(made)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), inputs) for y in (made, expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
