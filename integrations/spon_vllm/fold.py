# SPDX-License-Identifier: Apache-2.0
"""``W alpha`` of vLLM's layers: from the weight as the checkpoint stores it, or by asking the layer's method.

A method that rounds activations, too (W8A8), would round alpha in the product, so it is not asked where the weight can
be read (`stored.stored_weight`). It can be read until the method repacks it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spon_plugin.errors import SponError
from spon_plugin.weights import Opaque, RowWeight

_ROUNDING = 0.02
"""How far, in relation, ``W alpha`` may be from the sum of what alpha's halves give: bfloat16 and 8 bits stay below."""


def product(weight: RowWeight, alpha: Tensor, start: int, stop: int) -> Tensor:
    """``W alpha`` of the outputs from `start` to `stop`, float32.

    Args:
        weight: of a fused layer.
        alpha: float32 ``[in_features]`` of this rank.
        start: of one linear's outputs.
        stop: their end.
    """
    if start % weight.unit or (stop % weight.unit and stop != weight.out_features):
        return weight.product(alpha)[start:stop]  # a linear that begins or ends within a byte
    return weight.shard(start, stop).product(alpha)


def ask(inner: Any, layer: Any, alpha: Tensor, outputs: int, path: str) -> Tensor:
    """``W alpha`` as a method computes it, for a weight that cannot be read.

    Args:
        inner: vLLM's method.
        layer: its layer, ready to compute.
        alpha: float32 ``[in_features]`` of this rank.
        outputs: of the layer, on this rank.
        path: the linear's, for the error.

    Returns:
        float32 ``[out_features]`` of this rank.

    Raises:
        SponError: the method rounds its inputs to so few bits that the product is not linear.
    """
    weight = Opaque(lambda rows: inner.apply(layer, rows, None), alpha.numel(), outputs, layer.params_dtype)
    whole, even = weight.product(alpha), torch.arange(alpha.numel(), device=alpha.device) % 2 == 0
    error = (whole - weight.product(torch.where(even, alpha, 0)) - weight.product(torch.where(even, 0, alpha))).norm()
    if error > _ROUNDING * whole.norm():
        raise SponError.of(
            path, f"{type(inner).__name__}, which rounds inputs to a few bits",
            "a weight that can be read, or inputs in full precision",
            "Serve a base whose weights alone are quantized, or an adapter without alpha.",
        )  # fmt: skip
    return whole
