# SPDX-License-Identifier: Apache-2.0
"""Linears with eight-bit codes in `weight` and their scales beside it: the layout of transformers and vLLM.

transformers' `FP8Linear` (by tensor, or by blocks of inputs and outputs), `FbgemmFp8Linear` and
`CompressedTensorsFP8Linear` (by output), compressed-tensors' unpacked int8, and what vLLM's loader fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.weights.fp8 import Fp8Weight
from spon_plugin.weights.importers.kind import Kind, Unreadable, named_features
from spon_plugin.weights.int8 import Int8Weight
from spon_plugin.weights.row_weight import RowWeight

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("weight_scale_inv", "weight_scale")
"""Names of the scales; both multiply the codes, whatever the first one says."""


def eight_bit_weight(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    block: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
) -> RowWeight | None:
    """int8 or float8 codes with their scales.

    Args:
        codes: ``[out_features, in_features]``, int8 or float8.
        scale: one number, one for each linear of a fused layer, one for each output, one for each group of inputs and
            output, or one for each block of both; float, or bytes that are exponents (MX formats).
        zero: zero points in the shape of `scale`; None for none.
        block: outputs and inputs of a block. None for what the shapes say.
        sizes: outputs of each linear of a fused layer; None for one linear.

    Returns:
        None where the shapes do not say what belongs to what.
    """
    if codes.dtype not in (*_FLOAT8, torch.int8) or codes.dim() != 2:
        return None
    found = _by_group(codes, scale, block, sizes or codes.shape[:1])
    if found is None:
        return None
    scales, size = found
    zeros = None
    if zero is not None:
        by_group = _by_group(codes, zero, block, sizes or codes.shape[:1])
        if by_group is None or codes.dtype in _FLOAT8:
            return None
        zeros = by_group[0]
    if scales.dtype == torch.uint8:
        scales = torch.exp2(scales.float() - 127)
    elif scales.dtype == torch.float8_e8m0fnu:
        scales = scales.float()
    kind = Fp8Weight if codes.dtype in _FLOAT8 else Int8Weight
    return kind(codes.t(), scales, zeros, size)


def _by_group(
    codes: Tensor, scale: Tensor, block: Sequence[int] | None, sizes: Sequence[int]
) -> tuple[Tensor, int] | None:
    """Scales as ``[groups, out_features]``, and the inputs of a group."""
    out_features, in_features = codes.shape
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(1, out_features), in_features
    # By their number alone, 128 x 128 blocks of 16384 inputs would be one scale for each output.
    is_column = scale.dim() < 2 or (block is None and scale.shape[1] == 1)
    if is_column and scale.numel() == out_features:
        return scale.reshape(1, out_features), in_features
    if is_column and scale.numel() == len(sizes):
        each = torch.tensor(list(sizes), device=scale.device)
        return scale.reshape(-1).repeat_interleave(each).unsqueeze(0), in_features
    if scale.dim() != 2:
        return None
    height, width = block or (-(-n // m) for n, m in zip(codes.shape, scale.shape, strict=True))
    if tuple(scale.shape) != (-(-out_features // height), -(-in_features // width)):
        return None
    # Each linear of a fused layer has blocks of its own; ones that end within a block would shift the others'.
    if len(sizes) > 1 and any(size % height for size in sizes):
        return None
    return scale.repeat_interleave(height, 0)[:out_features].t(), width


def _matches(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.dtype in (*_FLOAT8, torch.int8)
        and hasattr(module, "in_features")
        and any(isinstance(getattr(module, name, None), Tensor) for name in SCALES)
    )


def _weight(module: Any) -> RowWeight | Unreadable:
    codes = module.weight
    if type(codes) not in (Tensor, nn.Parameter) or tuple(codes.shape) != (module.out_features, module.in_features):
        return Unreadable(f"{type(codes).__name__} of {codes.dtype}, shape {tuple(codes.shape)}")
    scale = next(getattr(module, name) for name in SCALES if isinstance(getattr(module, name, None), Tensor))
    block = getattr(module, "block_size", None) or getattr(module, "weight_block_size", None)
    found = eight_bit_weight(codes, scale, getattr(module, "weight_zero_point", None), block)
    return found or Unreadable(f"{codes.dtype} with scales of shape {tuple(scale.shape)}")


EIGHT_BIT = Kind("8-bit codes with scales", _matches, named_features, _weight)
