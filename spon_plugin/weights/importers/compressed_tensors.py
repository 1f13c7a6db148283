# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors: pack-quantized integers, and floating-point weights that every forward pass rounds.

The packed ones are int32 ``weight_packed [out_features, in_features * bits / 32]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.weights.dense import DenseWeight
from spon_plugin.weights.importers.kind import Kind, Unreadable, named_features
from spon_plugin.weights.importers.torch_linear import is_plain_matrix
from spon_plugin.weights.importers.words import integer_weight, unpack_words
from spon_plugin.weights.row_weight import RowWeight
from spon_plugin.weights.scaled import ScaledWeight


def packed_weight(
    packed: Tensor, scale: Tensor, zero: Tensor | None, in_features: int, g_idx: Tensor | None = None
) -> ScaledWeight | None:
    """The weight that pack-quantized tensors hold.

    Args:
        packed: int32 ``[out_features, ceil(in_features * bits / 32)]``, which says the bits.
        scale: ``[out_features, groups]``.
        zero: int32 ``[ceil(out_features * bits / 32), groups]`` packed along the outputs, or int8
            ``[out_features, groups]``, signed; None for symmetric weights.
        in_features: of the weight.
        g_idx: ``[in_features]``, the group of each input, -1 where unset; None for runs.

    Returns:
        None for other numbers of bits than 4 and 8, and shapes that do not belong together.
    """
    bits = next((bits for bits in (4, 8) if packed.shape[1] == -(-in_features * bits // 32)), None)
    if bits is None or scale.dim() != 2 or scale.shape[0] != packed.shape[0]:
        return None
    out_features, groups = scale.shape
    codes = unpack_words(packed, bits, in_features).t()
    zeros = None
    if zero is not None and zero.dtype == torch.int32 and zero.shape[0] != out_features:
        zeros = unpack_words(zero.t(), bits, out_features)
    elif zero is not None:
        zeros = (zero.to(torch.int16) + 2 ** (bits - 1)).t()
    known = g_idx if g_idx is not None and bool((g_idx >= 0).all()) else None
    return integer_weight(bits, codes, scale.t(), zeros, -(-in_features // groups), known)


def _matches(module: nn.Module) -> bool:
    return (
        isinstance(getattr(module, "weight_packed", None), Tensor)
        and isinstance(getattr(module, "weight_scale", None), Tensor)
        and hasattr(module, "in_features")
    )


def _weight(module: Any) -> RowWeight | Unreadable:
    packed, scale = module.weight_packed, module.weight_scale
    found = None
    if packed.dtype == torch.int32:
        zero, g_idx = getattr(module, "weight_zero_point", None), getattr(module, "weight_g_idx", None)
        found = packed_weight(packed, scale, zero, module.in_features, g_idx)
    return found or Unreadable(f"compressed-tensors codes of {packed.dtype}, shape {tuple(packed.shape)}")


def _rounds(module: nn.Module) -> bool:
    scheme, status = getattr(module, "quantization_scheme", None), getattr(module, "quantization_status", None)
    weight = getattr(module, "weight", None)
    rounded = getattr(scheme, "weights", None) is not None and getattr(status, "value", "") in _NOT_COMPRESSED
    return isinstance(module, nn.Linear) and rounded and is_plain_matrix(weight)


def _rounded(module: Any) -> RowWeight | Unreadable:
    if not getattr(module, "quantization_enabled", True):
        return DenseWeight(module.weight.t())
    # The host is loaded: it has made this module.
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    with torch.no_grad():
        return DenseWeight(
            forward_quantize(module, module.weight.data, "weight", module.quantization_scheme.weights).t()
        )


_NOT_COMPRESSED = ("initialized", "calibration", "frozen")

COMPRESSED_TENSORS_ROUNDED = Kind("compressed-tensors, not compressed", _rounds, named_features, _rounded)
COMPRESSED_TENSORS = Kind("compressed-tensors", _matches, named_features, _weight)
