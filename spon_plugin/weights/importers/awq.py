# SPDX-License-Identifier: Apache-2.0
"""AWQ in its GEMM layout: int32 ``qweight [in_features, out_features / 8]``, an order of outputs in each word."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.weights.importers.kind import Kind, Unreadable, named_features
from spon_plugin.weights.importers.words import integer_weight, unpack_words
from spon_plugin.weights.row_weight import RowWeight
from spon_plugin.weights.scaled import ScaledWeight

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a word's eight outputs lies in its place i."""


def awq_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> ScaledWeight | None:
    """The weight that AWQ's tensors of four bits hold.

    Args:
        qweight: int32 ``[in_features, out_features / 8]``.
        qzeros: int32 ``[groups, out_features / 8]``.
        scales: ``[groups, out_features]``.

    Returns:
        None for shapes that do not belong together.
    """
    groups, out_features = scales.shape
    in_features = qweight.shape[0]
    if qweight.shape[1] * 8 != out_features or tuple(qzeros.shape) != (groups, out_features // 8):
        return None
    codes = unpack_words(qweight, 4, out_features, _ORDER)
    zeros = unpack_words(qzeros, 4, out_features, _ORDER)
    return integer_weight(4, codes, scales, zeros, -(-in_features // groups))


def _matches(module: nn.Module) -> bool:
    qweight = getattr(module, "qweight", None)
    return (
        isinstance(qweight, Tensor)
        and qweight.dtype == torch.int32
        and isinstance(getattr(module, "qzeros", None), Tensor)
        and isinstance(getattr(module, "scales", None), Tensor)
        and getattr(module, "g_idx", None) is None
        and hasattr(module, "in_features")
        and getattr(module, "bits", getattr(module, "w_bit", None)) == 4
    )


def _weight(module: Any) -> RowWeight | Unreadable:
    found = None
    if module.qweight.shape[0] == module.in_features and module.scales.shape[-1] == module.out_features:
        found = awq_weight(module.qweight, module.qzeros, module.scales)
    return found or Unreadable(f"AWQ codes of shape {tuple(module.qweight.shape)}")


AWQ = Kind("AWQ", _matches, named_features, _weight)
