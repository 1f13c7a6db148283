# SPDX-License-Identifier: Apache-2.0
"""Weights of one signed byte, with a scale for each output or for each group of inputs and output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spon_plugin.weights.product import chunk_elements
from spon_plugin.weights.scaled import ScaledWeight


@dataclass(frozen=True, eq=False)
class Int8Weight(ScaledWeight):
    """See `ScaledWeight`; codes are int8 ``[in_features, out_features]``."""

    format = "int8"
    code_dtype = torch.int8


def round_to_int8(weight: Tensor) -> Int8Weight:
    """A floating-point weight rounded to the nearest codes, the largest of each output at 127.

    Args:
        weight: ``[out_features, in_features]``.
    """
    out_features, in_features = weight.shape
    codes = torch.empty((in_features, out_features), dtype=torch.int8, device=weight.device)
    scales = torch.empty((1, out_features), dtype=torch.float32, device=weight.device)
    size = max(1, chunk_elements(weight.device) // max(1, in_features))
    for first in range(0, out_features, size):
        part = weight[first : first + size].float()
        scale = part.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        scales[0, first : first + size] = scale
        codes[:, first : first + size] = (part / scale.unsqueeze(1)).round().to(torch.int8).t()
    return Int8Weight(codes, scales, group_size=in_features)
