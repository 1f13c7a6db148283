# SPDX-License-Identifier: Apache-2.0
"""torchao: linears of torch whose weight is a tensor subclass with codes, scales and, in some, zero points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.weights.fp8 import Fp8Weight
from spon_plugin.weights.importers.kind import Kind, Unreadable, named_features
from spon_plugin.weights.int8 import Int8Weight
from spon_plugin.weights.row_weight import RowWeight


def _is_torchao(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    own = type(weight) not in (Tensor, nn.Parameter) and type(weight).__module__.startswith("torchao.")
    return isinstance(module, nn.Linear) and own and hasattr(weight, "dequantize")


def _weight(module: Any) -> RowWeight | Unreadable:
    weight = module.weight
    name = type(weight).__name__
    codes, scale, block = (getattr(weight, field, None) for field in ("qdata", "scale", "block_size"))
    zero = getattr(weight, "zero_point", None)
    whole = Unreadable(f"torchao's {name}", weight.dequantize)
    if not isinstance(codes, Tensor) or not isinstance(scale, Tensor) or codes.shape != weight.shape or not block:
        return whole
    out_features, in_features = codes.shape
    height, size = block
    if scale.numel() * height * size != codes.numel() or height not in (1, out_features):
        return whole
    # [out, groups] or one number for all outputs -> [groups, out]
    scales = scale.reshape(-1, in_features // size).expand(out_features, -1).t()
    if codes.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return Fp8Weight(codes.t(), scales, group_size=size)
    if codes.dtype == torch.int8:
        zeros = None if zero is None else zero.reshape(-1, in_features // size).expand(out_features, -1).t()
        return Int8Weight(codes.t(), scales, zeros, size)
    return whole


TORCHAO = Kind("torchao", _is_torchao, named_features, _weight)
