# SPDX-License-Identifier: Apache-2.0
"""The objective of SPON: forward KL from the dense to the sparse model, without the logits of a whole batch in float32.

``KL(softmax(dense) || softmax(sparse))`` summed over tokens (arXiv 2512.12744, eq. 6). A vocabulary of 128k at
8 x 2048 tokens is 8 GiB of float32 logits for each model; here only a chunk of tokens has its logits at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]
"""Maps hidden states ``[n, hidden]`` to logits ``[n, vocabulary]``. Its parameters receive no gradient."""

# Floats in one chunk's float32 logits (256 MiB); about six such buffers live at the peak.
_CHUNK_FLOATS = 1 << 26


def kl_reference(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``sum_t KL(teacher_t || student_t)`` written out; the truth that `kl_divergence` is tested against.

    Args:
        student_logits: ``[n, vocabulary]``, any floating dtype.
        teacher_logits: ``[n, vocabulary]``.
        temperature: both are divided by it.

    Returns:
        float32 scalar, in nats.
    """
    student = (student_logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.float() / temperature).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum()


def _divided(x: Tensor, temperature: float) -> Tensor:
    """``x / temperature``; without a pass over x where that is x itself."""
    return x if temperature == 1.0 else x / temperature


class _ChunkedKL(torch.autograd.Function):
    """`kl_reference` of two heads' outputs; the gradient is made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Head, temperature: float, chunk: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        gradient = torch.empty_like(student) if student.requires_grad else None
        for start in range(0, len(student), chunk):
            rows = slice(start, start + chunk)
            hidden = student[rows].detach().requires_grad_(gradient is not None)
            with torch.enable_grad():
                logits = head(hidden)
            log_student = _divided(logits.detach().float(), temperature).log_softmax(-1)
            log_teacher = _divided(head(teacher[rows]).float(), temperature).log_softmax(-1)
            probability = log_teacher.exp()
            total += (probability * log_teacher.sub_(log_student)).sum()
            if gradient is not None:
                d_logits = _divided(log_student.exp_().sub_(probability), temperature)
                (gradient[rows],) = torch.autograd.grad(logits, hidden, d_logits.to(logits.dtype))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None, None


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    head: Head | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """``sum_t KL(teacher_t || student_t)`` in nats, chunked over tokens.

    Args:
        student: hidden states ``[n, hidden]`` of the sparse model; with ``head=None``, its logits.
        teacher: the same of the dense model; receives no gradient.
        head: from hidden states to logits; must be the same for both.
        temperature: both models' logits are divided by it.
        chunk: tokens per chunk; chosen to keep a chunk's float32 logits within 256 MiB by default.

    Returns:
        float32 scalar; divide by the number of tokens for the mean.
    """
    if chunk is None:
        vocabulary = (head(teacher[:1].detach()) if head is not None else teacher[:1]).shape[-1]
        chunk = max(1, _CHUNK_FLOATS // vocabulary)
    with torch.autocast(student.device.type, enabled=False):
        result = _ChunkedKL.apply(student, teacher.detach(), head or nn.Identity(), temperature, chunk)
    assert isinstance(result, Tensor)
    return result
