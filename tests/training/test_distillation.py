# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from spon_plugin.training.distillation import kl_divergence, kl_reference


def hidden(n=13, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(n, width, generator=generator).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("chunk", [1, 4, 13, 1000, None])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("head", ["linear", "softcap", "none"])
def test_chunked_kl_equals_the_reference_and_its_gradient(chunk, temperature, head):
    torch.manual_seed(0)
    linear = nn.Linear(8, 31).requires_grad_(False)
    function = {"linear": linear, "softcap": lambda h: 3 * torch.tanh(linear(h) / 3), "none": None}[head]
    student, teacher = hidden()
    loss = kl_divergence(student, teacher, function, temperature, chunk)
    (gradient,) = torch.autograd.grad(loss * 0.7, student)
    logits = function or (lambda h: h)
    expected = kl_reference(logits(student), logits(teacher), temperature)
    (expected_gradient,) = torch.autograd.grad(expected * 0.7, student)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_kl_of_a_model_with_itself_is_zero_and_otherwise_positive():
    student, teacher = hidden()
    assert kl_divergence(teacher, teacher).item() == pytest.approx(0, abs=1e-5)
    assert kl_divergence(student, teacher).item() > 0.1


def test_it_is_forward_kl():
    teacher = torch.tensor([[0.0, -50.0]])  # sure of the first
    student = torch.tensor([[0.0, 0.0]])  # undecided
    assert kl_divergence(student, teacher).item() == pytest.approx(0.6931, abs=1e-3)
    assert kl_divergence(teacher, student).item() > 20  # the reverse would be log 2 here


def test_only_a_chunk_has_logits_at_a_time():
    sizes = []

    def head(h):
        sizes.append(len(h))
        return h.repeat(1, 4)

    student, teacher = hidden(50)
    kl_divergence(student, teacher, head, chunk=7).backward()
    assert max(sizes) == 7


def test_bfloat16_hidden_states_are_compared_in_float32():
    student, teacher = hidden(dtype=torch.bfloat16)
    loss = kl_divergence(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kl_reference(student, teacher))
    loss.backward()
    assert student.grad.dtype == torch.bfloat16
