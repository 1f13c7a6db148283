# SPDX-License-Identifier: Apache-2.0
"""The weight of a layer of vLLM's as the checkpoint stores it: read before the layer's method repacks it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spon_plugin.weights import RowWeight
from spon_plugin.weights.dense import DenseWeight
from spon_plugin.weights.importers.awq import awq_weight
from spon_plugin.weights.importers.compressed_tensors import packed_weight
from spon_plugin.weights.importers.eight_bit import SCALES, eight_bit_weight
from spon_plugin.weights.importers.gptq import gptq_weight
from spon_plugin.weights.importers.torch_linear import is_plain_matrix


def stored_weight(layer: Any, sizes: Sequence[int], in_features: int, method: Any = None) -> RowWeight | None:
    """Read the weight of a layer that vLLM's loader has filled and nothing has repacked.

    Floating-point weights; 8-bit ones (int8, float8) with a scale for the tensor, for each linear of a fused layer, for
    each output, or for each block, as compressed-tensors, FP8, ModelOpt and Quark checkpoints have them; and packed
    ones of 4 or 8 bits: compressed-tensors' (symmetric or not, by group or output), GPTQ's and AWQ's.

    Args:
        layer: vLLM's.
        sizes: outputs of the linears in it, on this rank.
        in_features: inputs on this rank.
        method: the layer's own, which knows how GPTQ's zero points are stored.

    Returns:
        None for a weight in another form, or one that its method uses on inputs or outputs that it transforms.
    """
    if getattr(method, "input_tfms", None) or getattr(method, "output_tfms", None):  # QuIP, SpinQuant
        return None
    rows, packed, qweight = sum(sizes), _tensor(layer, "weight_packed"), _tensor(layer, "qweight")
    if packed is not None:
        scale = _tensor(layer, "weight_scale")
        if packed.dtype != torch.int32 or scale is None or packed.shape[0] != rows:
            return None
        zero, g_idx = _tensor(layer, "weight_zero_point"), _tensor(layer, "weight_g_idx")
        return packed_weight(packed, scale, zero, in_features, g_idx)
    if qweight is not None:
        return _with_zero_points(layer, qweight, rows, in_features, getattr(method, "quant_config", None))
    codes = _tensor(layer, "weight")
    if codes is None or tuple(codes.shape) != (rows, in_features):
        return None
    if is_plain_matrix(codes):
        return DenseWeight(codes.t())
    scales = [scale for scale in (_tensor(layer, name) for name in SCALES) if scale is not None]
    offset = any(getattr(layer, name, None) is not None for name in ("weight_zero_point", "weight_scale_2"))
    if len(scales) != 1 or offset:
        return None
    return eight_bit_weight(codes, scales[0], None, getattr(layer, "weight_block_size", None), sizes)


def _with_zero_points(layer: Any, qweight: Tensor, rows: int, in_features: int, config: Any) -> RowWeight | None:
    """GPTQ's and AWQ's tensors have the same names; only the one packs along the inputs."""
    scales, qzeros = _tensor(layer, "scales"), _tensor(layer, "qzeros")
    if scales is None or qzeros is None or qweight.dtype != torch.int32 or scales.shape[-1] != rows:
        return None
    if tuple(qweight.shape) == (in_features, rows // 8):
        return awq_weight(qweight, qzeros, scales) if getattr(config, "zero_point", True) else None
    bits = 32 * qweight.shape[0] // in_features
    if qweight.shape[0] * 32 != bits * in_features or qweight.shape[1] != rows:
        return None
    g_idx = _tensor(layer, "g_idx") if getattr(config, "desc_act", True) else None
    # vLLM does not look at the zero points of symmetric weights, which writers store in two ways.
    zeros = None if getattr(config, "is_sym", False) else qzeros
    told = getattr(config, "checkpoint_format", "")
    return gptq_weight(qweight, zeros, scales, g_idx, bits, told != "gptq_v2")


def _tensor(layer: Any, name: str) -> Tensor | None:
    found = getattr(layer, name, None)
    return found.data.as_subclass(Tensor) if isinstance(found, Tensor) else None
