# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from spon_plugin import SponError, keep_mask, sparsify
from spon_plugin.masking import check_sparsity


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


def test_a_vector_threshold_works_per_channel():
    x = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    assert sparsify(x, torch.tensor([0.5, 2.0])).tolist() == [[1, 0], [3, 3]]


def test_dense_tokens_keep_their_whole_input():
    x = torch.full((2, 3, 4), 0.1)
    dense = torch.tensor([[True, False, False], [False, False, True]])
    assert sparsify(x, threshold(1), dense).ne(0).any(-1).tolist() == dense.tolist()


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
