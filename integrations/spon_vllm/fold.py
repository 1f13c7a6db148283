# SPDX-License-Identifier: Apache-2.0
"""``W alpha`` of vLLM's layers: from the weight as the checkpoint stores it, or by asking the layer's method.

A method that rounds activations, too (W8A8), would round alpha in the product, so it is not asked where the weight can
be read. It can be read until the method repacks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spon_plugin.errors import SponError
from spon_plugin.weights import Opaque, RowWeight
from spon_plugin.weights.dense import DenseWeight
from spon_plugin.weights.importers.eight_bit import SCALES, eight_bit_weight
from spon_plugin.weights.importers.torch_linear import is_plain_matrix

_ROUNDING = 0.02
"""How far, in relation, ``W alpha`` may be from the sum of what alpha's halves give: bfloat16 and 8 bits stay below."""


def stored_weight(layer: Any, sizes: Sequence[int], in_features: int) -> RowWeight | None:
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
    if is_plain_matrix(codes):
        return DenseWeight(codes.t())
    names = [name for name in SCALES if isinstance(getattr(layer, name, None), Tensor)]
    offset = any(getattr(layer, name, None) is not None for name in ("weight_zero_point", "weight_scale_2"))
    if len(names) != 1 or offset:
        return None
    scale = getattr(layer, names[0]).data.as_subclass(Tensor)
    return eight_bit_weight(codes, scale, None, getattr(layer, "weight_block_size", None), sizes)


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
