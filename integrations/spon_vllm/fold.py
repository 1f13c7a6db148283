# SPDX-License-Identifier: Apache-2.0
"""``W alpha`` of vLLM's layers: from the weight as the checkpoint stores it, or by asking the layer's method.

A method that rounds activations, too (W8A8), would round alpha in the product, so it is not asked where the weight can
be read. It can be read until the method repacks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spon_plugin.errors import SponError
from spon_plugin.layers.fold import probe

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_ROWS = 8192
"""Rows of a weight that are float32 at a time."""
_ROUNDING = 0.02
"""How far, in relation, ``W alpha`` may be from the sum of what alpha's halves give: bfloat16 and 8 bits stay below."""


class StoredWeight(NamedTuple):
    """``W [out_features, in_features]``, of this rank.

    Attributes:
        codes: ``[out_features, in_features]``, of a floating dtype or, with `scales`, 8 bits.
        scales: float32 ``[out_features or 1, blocks of inputs]``; None for 1.
        block: outputs and inputs that share a scale.
    """

    codes: Tensor
    scales: Tensor | None = None
    block: tuple[int, int] = (1, 1)

    def product(self, vector: Tensor, start: int, stop: int) -> Tensor:
        """``W vector`` for the outputs from `start` to `stop`.

        Args:
            vector: float32 ``[in_features]``.
            start: the first output.
            stop: after the last one.

        Returns:
            float32 ``[stop - start]``.
        """
        parts = [self._rows(first, min(first + _ROWS, stop)) @ vector for first in range(start, stop, _ROWS)]
        return torch.cat(parts)

    def _rows(self, start: int, stop: int) -> Tensor:
        rows = self.codes[start:stop].float()
        if self.scales is None:
            return rows
        outputs, inputs = (torch.arange(n, device=rows.device) for n in (stop, rows.shape[1]))
        scales = self.scales.to(rows.device)
        return rows * scales[outputs[start:] // self.block[0]][:, inputs // self.block[1]]


def stored_weight(layer: Any, sizes: Sequence[int], in_features: int) -> StoredWeight | None:
    """Read the weight of a layer that vLLM's loader has filled and nothing has repacked.

    Floating-point weights, and 8-bit ones (int8, float8) with a scale for the tensor, for each linear of a fused layer,
    for each output, or for each block, as compressed-tensors, FP8, ModelOpt and Quark checkpoints have them.

    Args:
        layer: vLLM's.
        sizes: outputs of the linears in it, on this rank.
        in_features: inputs on this rank.

    Returns:
        None for a weight in another form.
    """
    weight, rows = getattr(layer, "weight", None), sum(sizes)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (rows, in_features):
        return None
    codes = weight.data.as_subclass(Tensor)
    if codes.dtype in _FLOATS:
        return StoredWeight(codes)
    names = [n for n in ("weight_scale", "weight_scale_inv") if isinstance(getattr(layer, n, None), Tensor)]
    offset = any(getattr(layer, n, None) is not None for n in ("weight_zero_point", "weight_scale_2"))
    if codes.dtype not in _CODES or len(names) != 1 or offset:
        return None
    scales = _as_float(getattr(layer, names[0]).data.as_subclass(Tensor))
    if scales.numel() == 1:
        return StoredWeight(codes, scales.reshape(1, 1), (rows, in_features))
    if scales.numel() == len(sizes) != rows:
        each = torch.tensor(sizes, device=scales.device)
        return StoredWeight(codes, scales.reshape(-1).repeat_interleave(each).unsqueeze(1), (1, in_features))
    if scales.numel() == rows:
        return StoredWeight(codes, scales.reshape(rows, 1), (1, in_features))
    if scales.dim() != 2:
        return None
    given = getattr(layer, "weight_block_size", None)
    block = tuple(given) if given else tuple(-(-n // m) for n, m in zip(codes.shape, scales.shape, strict=True))
    fits = all(-(-n // b) == m for n, b, m in zip(codes.shape, block, scales.shape, strict=True))
    # Each linear of a fused layer has blocks of its own; ones that end within a block would shift the others'.
    whole = len(sizes) == 1 or all(size % block[0] == 0 for size in sizes)
    return StoredWeight(codes, scales, (block[0], block[1])) if fits and whole else None


def _as_float(scales: Tensor) -> Tensor:
    """Scales in float32; a byte is an exponent (MX formats)."""
    return torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()


def ask(inner: Any, layer: Any, alpha: Tensor, path: str) -> Tensor:
    """``W alpha`` as a method computes it, for a weight that cannot be read.

    Args:
        inner: vLLM's method.
        layer: its layer, ready to compute.
        alpha: float32 ``[in_features]`` of this rank.
        path: the linear's, for the error.

    Returns:
        float32 ``[out_features]`` of this rank.

    Raises:
        SponError: the method rounds its inputs to so few bits that the product is not linear.
    """

    def product(vector: Tensor) -> Tensor:
        return probe(lambda rows: inner.apply(layer, rows, None), vector, layer.params_dtype)

    whole, even = product(alpha), torch.arange(alpha.numel(), device=alpha.device) % 2 == 0
    error = (whole - product(torch.where(even, alpha, 0)) - product(torch.where(even, 0, alpha))).norm()
    if error > _ROUNDING * whole.norm():
        raise SponError.of(
            path, f"{type(inner).__name__}, which rounds inputs to a few bits",
            "a weight that can be read, or inputs in full precision",
            "Serve a base whose weights alone are quantized, or an adapter without alpha.",
        )  # fmt: skip
    return whole
