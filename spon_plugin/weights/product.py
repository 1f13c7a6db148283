# SPDX-License-Identifier: Apache-2.0
"""``W alpha`` of a weight that is decoded part by part, with a gradient: what every fold comes down to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

# Decoded elements that are held at a time: what a core's cache holds; on a GPU, few kernel launches.
_CPU_CHUNK, _GPU_CHUNK = 1 << 20, 1 << 24


class Decodable(Protocol):
    """What gives its values in parts."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""

    def parts(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight as ``[some outputs, in_features]`` in `dtype`, part by part."""


def product(weight: Decodable, alpha: Tensor, codes: Tensor | None = None) -> Tensor:
    """``W alpha``, differentiable in alpha and in `codes`.

    It is computed in float32 (float64 for a float64 weight), whatever autocast says. Nothing decoded is kept for the
    backward pass.

    Args:
        weight: gives the parts; decoded again for the backward pass.
        alpha: ``[in_features]``.
        codes: ``[in_features, out_features]``, the values themselves, where they may be trained.

    Returns:
        ``[out_features]``, float32 (float64).
    """
    out = _Product.apply(codes, alpha, weight)
    assert isinstance(out, Tensor)
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor | None, alpha: Tensor, weight: Decodable) -> Tensor:
        ctx.save_for_backward(codes, alpha)
        ctx.weight = weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with without_autocast(alpha.device):
            vector = _aligned(alpha.to(dtype))
            return torch.cat([F.linear(vector, _aligned(part)) for part in weight.parts(dtype)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        codes, alpha = ctx.saved_tensors
        (grad,) = grads
        for_codes = for_alpha = None
        with without_autocast(alpha.device):
            if ctx.needs_input_grad[0]:
                for_codes = torch.outer(alpha.to(grad.dtype), grad).to(codes.dtype)
            if ctx.needs_input_grad[1]:
                for_alpha, first = torch.zeros(alpha.shape[0], dtype=grad.dtype, device=grad.device), 0
                for part in ctx.weight.parts(grad.dtype):
                    for_alpha += grad[first : first + part.shape[0]] @ _aligned(part)
                    first += part.shape[0]
                for_alpha = for_alpha.to(alpha.dtype)
        return for_codes, for_alpha, None


def chunk_elements(device: torch.device) -> int:
    """How many decoded elements a part should have."""
    return _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """While it lasts, products on `device` are computed in the dtypes of their operands."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor`, copied if it does not start on a 64-byte boundary.

    A matrix-vector product on the CPU sums in another order there, so a weight that was mapped from a file would give
    other bits than the same weight in the process that trained alpha. A compiler sees no addresses.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return tensor
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()
