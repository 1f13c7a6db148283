# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

import pytest
import torch

from spon_plugin.kernels import masked_input as module
from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.kernels.masked_input import masked_input, reference
from spon_plugin.machine import DTYPES

SUMS = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}  # of the shift's gradient: another order


def gradients(function, x, threshold, center, shift, dense):
    x = x.clone().requires_grad_()
    shift = None if shift is None else shift.clone().requires_grad_()
    out, keep = function(x, threshold, center, shift, dense)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    return out.detach(), keep, x.grad, None if shift is None else shift.grad


@pytest.mark.skipif(not cpu.is_available(), reason="no OpenMP runtime to run on")
@pytest.mark.parametrize("dense", [False, True], ids=["all sparse", "some dense"])
@pytest.mark.parametrize("shift", [False, True], ids=["no shift", "shift"])
@pytest.mark.parametrize("center", [False, True], ids=["no centre", "centre"])
@pytest.mark.parametrize("channels", [False, True], ids=["one threshold", "per channel"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 37), (2, 64), (0, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_fused_pass_is_the_reference_and_its_gradient(dtype, shape, channels, center, shift, dense):
    torch.manual_seed(0)
    features = shape[-1]
    x = torch.randn(shape).to(dtype)
    if x.numel():
        x.view(-1)[0] = float("nan")
    arguments = (
        torch.rand(features if channels else 1),
        torch.randn(features) * 0.2 if center else None,
        torch.randn(features) if shift else None,
        torch.rand(shape[:-1]) < 0.3 if dense else None,
    )
    assert module._is_fused(x, arguments[0])
    ours, theirs = gradients(masked_input, x, *arguments), gradients(reference, x, *arguments)
    for got, expected in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    if shift:
        torch.testing.assert_close(ours[3], theirs[3], rtol=SUMS[dtype], atol=SUMS[dtype] * max(1, len(x)))


@pytest.mark.parametrize("threshold", [0.0, 1e9], ids=["nothing masked", "everything masked"])
def test_empty_and_full_masks(threshold):
    x = torch.randn(4, 9).requires_grad_()
    alpha = torch.randn(9).requires_grad_()
    out, keep = masked_input(x, torch.tensor([threshold]), None, alpha)
    kept = threshold == 0
    assert bool(keep.all()) == kept and bool(keep.any()) == kept
    torch.testing.assert_close(out, x + alpha if kept else alpha.expand(4, 9))
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, float(kept)))
    torch.testing.assert_close(alpha.grad, torch.full((9,), 4.0))


def test_layouts_with_gaps_and_a_mask_that_nobody_differentiates():
    x = torch.randn(6, 10)[:, ::2].requires_grad_()
    out, keep = masked_input(x, torch.rand(10)[::2])
    assert not keep.requires_grad
    out.t().contiguous().t().backward(torch.ones(5, 6).t())
    torch.testing.assert_close(x.grad, keep.float())


def test_a_gradient_of_a_gradient_is_refused():
    x = torch.randn(2, 3).requires_grad_()
    out, _ = masked_input(x, torch.tensor([0.1]))
    if not module._is_fused(x, torch.tensor([0.1])):
        pytest.skip("made of torch's operations here")
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.skipif(not cpu.is_available(), reason="no OpenMP runtime to run on")
def test_fewer_threads_than_were_asked_for():
    """As OpenMP gives under `OMP_THREAD_LIMIT` or `OMP_DYNAMIC`; memory that is new holds what was there before."""
    code = """
import torch
from spon_plugin.kernels.masked_input import masked_input
torch.set_num_threads(4)
dirty = torch.empty(4, 64).fill_(1e9)
del dirty
x, shift = torch.randn(16, 64), torch.zeros(64, requires_grad=True)
masked_input(x, torch.tensor([0.5]), None, shift, None)[0].sum().backward()
print(torch.equal(shift.grad, torch.full((64,), 16.0)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_THREAD_LIMIT": "1"}, capture_output=True, text=True
    )
    assert done.stdout == "True\n", done.stderr
