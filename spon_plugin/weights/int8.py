# SPDX-License-Identifier: Apache-2.0
"""Weights of one signed byte, with a scale for each output or for each group of inputs and output."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spon_plugin.weights.scaled import ScaledWeight


@dataclass(frozen=True, eq=False)
class Int8Weight(ScaledWeight):
    """See `ScaledWeight`; codes are int8 ``[in_features, out_features]``."""

    format = "int8"
    code_dtype = torch.int8
