# SPDX-License-Identifier: Apache-2.0
"""GPTQ: int32 ``qweight [in_features * bits / 32, out_features]``, words along the inputs, perhaps in act-order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.weights.importers.kind import Kind, Unreadable, named_features
from spon_plugin.weights.importers.words import integer_weight, unpack_words
from spon_plugin.weights.row_weight import RowWeight
from spon_plugin.weights.scaled import ScaledWeight


def gptq_weight(
    qweight: Tensor, qzeros: Tensor | None, scales: Tensor, g_idx: Tensor | None, bits: int, zeros_less_one: bool
) -> ScaledWeight | None:
    """The weight that GPTQ's tensors hold.

    Args:
        qweight: int32 ``[in_features * bits / 32, out_features]``.
        qzeros: int32 ``[groups, out_features * bits / 32]``; None for symmetric weights.
        scales: ``[groups, out_features]``.
        g_idx: ``[in_features]``, the group of each input; None for runs.
        bits: 4 or 8.
        zeros_less_one: whether the zero points are stored less one, as the checkpoint format "gptq" has them and
            "gptq_v2" has not.

    Returns:
        None for other numbers of bits, and shapes that do not belong together.
    """
    groups, out_features = scales.shape
    in_features = qweight.shape[0] * 32 // bits
    grouped = g_idx if g_idx is not None and g_idx.numel() == in_features else None
    if bits not in (4, 8) or qweight.shape[1] != out_features or (grouped is None and in_features % groups):
        return None
    codes = unpack_words(qweight.t(), bits, in_features).t()
    zeros = None if qzeros is None else unpack_words(qzeros, bits, out_features)
    if zeros is not None and zeros_less_one:
        zeros = (zeros + 1) & (2**bits - 1)
    return integer_weight(bits, codes, scales, zeros, max(1, in_features // groups), grouped)


def _matches(module: nn.Module) -> bool:
    tensors = [getattr(module, name, None) for name in ("qweight", "qzeros", "scales", "g_idx")]
    return (
        all(isinstance(tensor, Tensor) for tensor in tensors)
        and hasattr(module, "in_features")
        and hasattr(module, "bits")
        and tensors[0].dtype == torch.int32  # type: ignore[union-attr]
        and tuple(tensors[0].shape) == (module.in_features * module.bits // 32, module.out_features)  # type: ignore
    )


def holds_zeros_less_one(module: Any) -> bool:
    """Whether a loaded layer holds its zero points less one, as files of the format "gptq" do.

    AutoGPTQ's layers do. gptqmodel's kernels that require "gptq_v2" never do once they are loaded: files of the older
    format are converted, which `qzero_format` tells, and those of the newer one are as they should be, which it does
    not tell.
    """
    if getattr(module, "REQUIRES_FORMAT_V2", False):
        return False
    return not hasattr(module, "qzero_format") or module.qzero_format() == 1


def _weight(module: Any) -> RowWeight | Unreadable:
    if getattr(module, "planar", False):
        return Unreadable("GPTQ codes in planes")
    less_one = holds_zeros_less_one(module)
    found = gptq_weight(module.qweight, module.qzeros, module.scales, module.g_idx, module.bits, less_one)
    return found or Unreadable(f"GPTQ codes of {module.bits} bits, scales of shape {tuple(module.scales.shape)}")


GPTQ = Kind("GPTQ", _matches, named_features, _weight)
