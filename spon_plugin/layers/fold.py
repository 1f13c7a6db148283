# SPDX-License-Identifier: Apache-2.0
"""``W alpha``, the bias that a spontaneous activation comes down to: any weight format, with a gradient or without."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spon_plugin.errors import SponError
from spon_plugin.layers.kinds import is_conv1d, linear_features

# Elements of the weight that are float32 at a time: what a core's cache holds; on a GPU, few kernel launches.
_CPU_CHUNK, _GPU_CHUNK = 1 << 20, 1 << 24


@torch.no_grad()
def fold_alpha(linear: nn.Module, alpha: Tensor, name: str = "layer") -> Tensor:
    """``W alpha``, the bias that a spontaneous activation comes down to (SPON, arXiv 2512.12744, eq. 5).

    Floating-point weights are multiplied in float32. Any other format (8-bit, 4-bit) is asked what it computes, as
    ``linear(alpha) - linear(0)``, so nothing has to be known about how its weight is packed.

    Args:
        linear: a linear layer, of any weight format.
        alpha: ``[in_features]``.
        name: the layer's name, for the error.

    Returns:
        float32 ``[out_features]``, on the device of the weight.

    Raises:
        SponError: alpha has another length than the layer's input.
    """
    in_features, _ = linear_features(linear, name)
    if tuple(alpha.shape) != (in_features,):
        raise SponError.of(f"{name}: alpha", tuple(alpha.shape), f"shape ({in_features},), the layer's in_features")
    weight = linear.weight
    assert isinstance(weight, Tensor)
    alpha = alpha.detach().to(weight.device)
    if type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and weight.dim() == 2:
        matrix = weight.float()
        return F.linear(alpha.float(), matrix.t() if is_conv1d(linear) else matrix)
    compute_dtype = getattr(linear, "compute_dtype", None) or torch.get_default_dtype()
    return probe(linear, alpha, compute_dtype)


def probe(linear: Callable[[Tensor], Tensor], alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """``W alpha`` of a linear map whose weight cannot be read, as ``linear(alpha) - linear(0)``; differentiable.

    Args:
        linear: maps ``[rows, in_features]`` in `dtype` to ``[rows, out_features]``.
        alpha: ``[in_features]``.
        dtype: that the map computes in.

    Returns:
        float32 ``[out_features]``.
    """
    # Two rows, because several 8-bit kernels refuse or re-quantize a single one.
    out = linear(torch.stack([alpha, torch.zeros_like(alpha)]).to(dtype)).float()
    return out[0] - out[1]


def weight_product(linear: nn.Module, alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """``W alpha`` of a linear layer, differentiable in alpha.

    A floating-point weight is multiplied in float32. One that is packed, sharded or elsewhere (8-bit, 4-bit,
    offloaded, ZeRO-3) is asked what it computes, as ``linear(alpha) - linear(0)``.

    Args:
        linear: `torch.nn.Linear`, Conv1D or a quantized linear.
        alpha: float32 ``[in_features]``.
        dtype: in which a packed weight is asked; usually the dtype of the layer's input.

    Returns:
        ``[out_features]`` in float32 (float64 for a float64 weight).
    """
    weight = linear.weight if hasattr(linear, "weight") else None
    if _is_plain(weight, alpha):
        assert isinstance(weight, Tensor)
        product = _WeightProduct.apply(weight.t() if is_conv1d(linear) else weight, alpha)
        assert isinstance(product, Tensor)
        return product
    compute_dtype = getattr(linear, "compute_dtype", None) or dtype
    with _without_autocast(alpha.device):
        return probe(linear, alpha, compute_dtype)


def _is_plain(weight: Any, alpha: Tensor) -> bool:
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.is_floating_point()
        and weight.dim() == 2
        and weight.device == alpha.device
        and weight.element_size() > 1  # float8 comes with scales
    )


class _WeightProduct(torch.autograd.Function):
    """``W alpha`` for ``W [out, in]``; only the weight itself is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(weight, alpha)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with _without_autocast(alpha.device):
            vector = _aligned(alpha.to(dtype))
            return torch.cat([F.linear(vector, _aligned(rows.to(dtype))) for rows in weight.split(_rows(weight))])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight, alpha = ctx.saved_tensors
        (grad,) = grads
        for_weight = for_alpha = None
        with _without_autocast(alpha.device):
            if ctx.needs_input_grad[0]:
                for_weight = torch.outer(grad, alpha.to(grad.dtype)).to(weight.dtype)
            if ctx.needs_input_grad[1]:
                size = _rows(weight)
                for_alpha = torch.zeros(weight.shape[1], dtype=grad.dtype, device=grad.device)
                for part, rows in zip(grad.split(size), weight.split(size), strict=True):
                    for_alpha += part @ _aligned(rows.to(grad.dtype))
                for_alpha = for_alpha.to(alpha.dtype)
        return for_weight, for_alpha


def _rows(weight: Tensor) -> int:
    chunk = _CPU_CHUNK if weight.device.type == "cpu" else _GPU_CHUNK
    return max(1, chunk // max(1, weight.shape[1]))


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor`, copied if it does not start on a 64-byte boundary.

    A matrix-vector product on the CPU sums in another order there, so a weight that was mapped from a file would give
    other bits than the same weight in the process that trained alpha.
    """
    return tensor if tensor.device.type != "cpu" or tensor.data_ptr() % 64 == 0 else tensor.clone()


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
