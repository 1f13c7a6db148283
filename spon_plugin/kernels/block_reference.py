# SPDX-License-Identifier: Apache-2.0
"""What a decoder block computes between its linears, for one token, in plain PyTorch: what `cpu/block.py` is held to.

The order of roundings is that of transformers' Llama (`models/llama/modeling_llama.py`), whose blocks Qwen2, Qwen3 and
Mistral share.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softmax


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A sum of the residual stream, and its RMS norm.

    Args:
        x: ``[..., size]``.
        delta: of the same shape, added to x; None for nothing.
        weight: ``[size]``.
        eps: added to the mean of the squares.

    Returns:
        ``x + delta``, and ``weight * norm(x + delta)``; both in the dtype of x.
    """
    total = x if delta is None else x + delta
    wide = total.float()
    return total, weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, each ``[..., features]``."""
    return silu(gate) * up


def attend(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int, scale: float
) -> Tensor:
    """The attention of one token to those before it and to itself, whose key and value are written behind theirs.

    Args:
        q: ``[heads * size]``, before its rotation.
        k: ``[kv_heads * size]``, before its rotation.
        v: likewise, without one.
        cos: of the token's position, ``[size]``; each half turns the other.
        sin: likewise.
        keys: ``[kv_heads, capacity, size]``; ``keys[:, :length]`` are those before, ``keys[:, length]`` is written.
        values: likewise.
        length: tokens before.
        scale: of the products.

    Returns:
        ``[heads * size]`` in the dtype of q.
    """
    kv_heads, _, size = keys.shape
    keys[:, length], values[:, length] = _turned(k.view(kv_heads, size), cos, sin), v.view(kv_heads, size)
    turned = _turned(q.view(kv_heads, -1, size), cos, sin).float()
    scores = torch.einsum("hgd,htd->hgt", turned, keys[:, : length + 1].float()) * scale
    return torch.einsum("hgt,htd->hgd", softmax(scores, -1), values[:, : length + 1].float()).to(q.dtype).flatten()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
