# SPDX-License-Identifier: Apache-2.0
"""``S(x) - center + shift`` of many tokens as one differentiable operation: what training spends on masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.kernels.cpu import masked_input as fused
from spon_plugin.machine import DTYPES
from spon_plugin.masking import choose_rows, deviation, keep_mask, zero_dropped


def masked_input(
    x: Tensor,
    threshold: Tensor,
    center: Tensor | None = None,
    shift: Tensor | None = None,
    dense: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``S(x) - center + shift`` for sparse tokens and `x` for dense ones; `S` as in `masking.sparsify`.

    With ``shift = center + alpha`` a linear without a folded bias computes ``W S(x) + W alpha`` of it: there is no
    product with alpha to make, and alpha's gradient is a sum over the input's. Alpha is then rounded with the input,
    so this is for float32.

    On a CPU it is one pass forward and one backward, which keep a byte for each entry; elsewhere, and under a
    compiler, it is made of torch's operations.

    Args:
        x: ``[..., in_features]``.
        threshold: float32 ``[1]`` or ``[in_features]``.
        center: float32 ``[in_features]`` or None for 0.
        shift: float32 ``[in_features]`` or None for 0.
        dense: bool ``[...]``, or None for no dense token.

    Returns:
        ``[..., in_features]`` in `x.dtype`, differentiable in `x` and `shift`, and bool ``[..., in_features]``, what
        was kept (of dense tokens, all).
    """
    if _is_fused(x, threshold):
        vectors = [None if v is None else v.contiguous() for v in (threshold, center, shift)]
        dense = None if dense is None else dense.expand(x.shape[:-1]).contiguous()
        out: tuple[Tensor, Tensor] = _MaskedInput.apply(x.contiguous(), *vectors, dense)
        return out
    return reference(x, threshold, center, shift, dense)


def reference(
    x: Tensor,
    threshold: Tensor,
    center: Tensor | None = None,
    shift: Tensor | None = None,
    dense: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`masked_input` in torch's operations."""
    apart = deviation(x, center)
    keep = keep_mask(apart, threshold)
    masked = zero_dropped(apart, keep)
    if shift is not None:
        masked = (masked + shift).to(x.dtype)
    return choose_rows(dense, x, masked), keep if dense is None else keep | dense.unsqueeze(-1)


def _is_fused(x: Tensor, threshold: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and type(x) is Tensor
        and x.dtype in DTYPES.values()
        and threshold.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and cpu.is_available()
    )


class _MaskedInput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        threshold: Tensor,
        center: Tensor | None,
        shift: Tensor | None,
        dense: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, keep = fused.forward(x, threshold, center, shift, dense)
        ctx.save_for_backward(keep, dense)
        ctx.mark_non_differentiable(keep)
        ctx.set_materialize_grads(False)
        return out, keep

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        keep, dense = ctx.saved_tensors
        if grads[0] is None:
            return None, None, None, None, None
        x, shift = fused.backward(grads[0].contiguous(), keep, dense, ctx.needs_input_grad[3])
        return x, None, None, shift, None
