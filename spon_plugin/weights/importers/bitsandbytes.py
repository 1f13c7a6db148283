# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: `Linear8bitLt`, int8 by output; `Linear4bit`, NF4 or FP4 codes in blocks along the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.weights.importers.kind import Kind, Unreadable, named_features
from spon_plugin.weights.int8 import Int8Weight
from spon_plugin.weights.row_weight import RowWeight


def _codes(module: Any) -> tuple[Tensor, Tensor] | None:
    """Codes ``[out, in]`` and the magnitudes ``[out]`` that 127 stands for; both move at the first forward pass."""
    for holder in (module.weight, module.state):
        codes, scales = getattr(holder, "CB", None), getattr(holder, "SCB", None)
        if isinstance(codes, Tensor) and isinstance(scales, Tensor) and codes.dtype == torch.int8:
            return codes, scales
    return None


def _is_8bit(module: nn.Module) -> bool:
    state = getattr(module, "state", None)
    return isinstance(module, nn.Linear) and hasattr(state, "SCB") and hasattr(state, "has_fp16_weights")


def _weight_8bit(module: Any) -> RowWeight | Unreadable:
    found = _codes(module)
    if found is None:
        return Unreadable("bitsandbytes 8-bit weight that is not quantized yet")
    codes, magnitudes = found
    return Int8Weight(codes.t(), magnitudes.float().div(127).unsqueeze(0), group_size=codes.shape[1])


def _is_4bit(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and hasattr(getattr(module, "weight", None), "quant_state")


def _weight_4bit(module: Any) -> RowWeight | Unreadable:
    state = module.weight.quant_state
    if state is None:
        return Unreadable("bitsandbytes 4-bit weight that is not quantized yet")
    if getattr(state, "packing_format_for_cpu", False):
        return Unreadable("bitsandbytes 4-bit weight, repacked for its own CPU kernel")
    return Unreadable("bitsandbytes 4-bit weight in blocks along the inputs", lambda: _decode(module.weight))


def _decode(weight: Any) -> Tensor:
    """The values, float32 ``[out_features, in_features]``."""
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        inner = state.state2
        absmax = _blocks(inner.code[absmax.long()], inner.absmax, inner.blocksize) + state.offset
    packed = weight.data.reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: state.shape.numel()]
    return _blocks(state.code.float()[codes.long()], absmax, state.blocksize).view(state.shape)


def _blocks(values: Tensor, scales: Tensor, size: int) -> Tensor:
    return values * scales.float().repeat_interleave(size)[: values.numel()]


BITSANDBYTES_8BIT = Kind("bitsandbytes 8-bit", _is_8bit, named_features, _weight_8bit)
BITSANDBYTES_4BIT = Kind("bitsandbytes 4-bit", _is_4bit, named_features, _weight_4bit)
