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

# Floats in one chunk's float32 logits; about six such buffers live at the peak. On a CPU 32 MiB, beyond which every
# buffer is made of fresh pages, and below which the products lose more than that; otherwise 256 MiB.
_CPU_CHUNK_FLOATS, _CHUNK_FLOATS = 1 << 23, 1 << 26


def kl_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    entropy_power: float = 0.0,
) -> Tensor:
    """``sum_t w_t KL(teacher_t || student_t)`` written out; the truth that `kl_divergence` is tested against.

    Args:
        student_logits: ``[n, vocabulary]``, any floating dtype.
        teacher_logits: ``[n, vocabulary]``.
        temperature: both are divided by it.
        top_k: the teacher's likeliest tokens, which count one by one; the others are one bin. 0 for all one by one.
        entropy_power: ``w_t = (1 + H_t) ** entropy_power`` with the teacher's entropy `H_t`.

    Returns:
        float32 scalar, in nats.
    """
    student, teacher = ((logits.float() / temperature).log_softmax(-1) for logits in (student_logits, teacher_logits))
    weight = (1 - (teacher.exp() * teacher).sum(-1)) ** entropy_power
    if 0 < top_k < teacher.shape[-1]:
        likeliest = teacher.topk(top_k, dim=-1).indices
        one_by_one = torch.zeros_like(teacher).scatter(-1, likeliest, -torch.inf)
        student, teacher = (
            torch.cat([p.gather(-1, likeliest), (p + one_by_one).logsumexp(-1, keepdim=True)], dim=-1)
            for p in (student, teacher)
        )
    return (weight * (teacher.exp() * (teacher - student)).sum(-1)).sum()


def _divided(x: Tensor, temperature: float) -> Tensor:
    """``x / temperature``; without a pass over x where that is x itself."""
    return x if temperature == 1.0 else x / temperature


def _binned(log_student: Tensor, log_teacher: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The divergence over the teacher's likeliest tokens and one bin of all others, and its gradient.

    With the bins' probabilities `P` and `Q` the gradient by a logit of the student is ``q_i - p_i`` for a token by
    itself and ``q_i - q_i P / Q`` for one of a bin.

    Args:
        log_student: ``[n, vocabulary]``, logarithms of probabilities.
        log_teacher: likewise.
        top_k: how many are by themselves, fewer than there are.

    Returns:
        ``[n]`` and ``[n, vocabulary]``.
    """
    log_p, likeliest = log_teacher.topk(top_k, dim=-1)
    log_q = log_student.gather(-1, likeliest)
    rest_p, rest_q = (x.scatter(-1, likeliest, -torch.inf).logsumexp(-1) for x in (log_teacher, log_student))
    p, rest = log_p.exp(), rest_p.exp()
    divergence = (p * (log_p - log_q)).sum(-1) + torch.where(rest > 0, rest * (rest_p - rest_q), 0)
    q = log_student.exp()
    gradient = q * (1 - (rest_p - rest_q).exp()).unsqueeze(-1)
    return divergence, gradient.scatter(-1, likeliest, log_q.exp() - p)


class _ChunkedKL(torch.autograd.Function):
    """`kl_reference` of two heads' outputs; the gradient is made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        head: Head,
        temperature: float,
        chunk: int,
        top_k: int,
        entropy_power: float,
    ) -> Tensor:
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
            weight = None
            if entropy_power:
                weight = (1 - (probability * log_teacher).nan_to_num(0.0).sum(-1)) ** entropy_power
            if 0 < top_k < logits.shape[-1]:
                divergence, d_logits = _binned(log_student, log_teacher, top_k)
            else:
                divergence = (probability * log_teacher.sub_(log_student)).sum(-1)
                d_logits = log_student.exp_().sub_(probability)
            total += (divergence if weight is None else weight * divergence).sum()
            if gradient is not None:
                d_logits = _divided(d_logits if weight is None else d_logits * weight.unsqueeze(-1), temperature)
                (gradient[rows],) = torch.autograd.grad(logits, hidden, d_logits.to(logits.dtype))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), *[None] * 6


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    head: Head | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    top_k: int = 0,
    entropy_power: float = 0.0,
) -> Tensor:
    """``sum_t KL(teacher_t || student_t)`` in nats, chunked over tokens; see `Objective` for the options.

    Args:
        student: hidden states ``[n, hidden]`` of the sparse model; with ``head=None``, its logits.
        teacher: the same of the dense model; receives no gradient.
        head: from hidden states to logits; must be the same for both.
        temperature: both models' logits are divided by it.
        chunk: tokens per chunk; chosen by default to keep a chunk's float32 logits within 32 MiB on a CPU and 256 MiB
            elsewhere.
        top_k: the divergence is over the teacher's `top_k` likeliest tokens and one bin of all others; 0 for all.
        entropy_power: tokens count ``(1 + H) ** entropy_power`` times, `H` the teacher's entropy in nats.

    Returns:
        float32 scalar; divide by the number of tokens for the mean.
    """
    if chunk is None:
        vocabulary = (head(teacher[:1].detach()) if head is not None else teacher[:1]).shape[-1]
        chunk = max(1, (_CPU_CHUNK_FLOATS if student.device.type == "cpu" else _CHUNK_FLOATS) // vocabulary)
    with torch.autocast(student.device.type, enabled=False):
        result = _ChunkedKL.apply(
            student, teacher.detach(), head or nn.Identity(), temperature, chunk, top_k, entropy_power
        )
    assert isinstance(result, Tensor)
    return result
