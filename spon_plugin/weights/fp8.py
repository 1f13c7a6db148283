# SPDX-License-Identifier: Apache-2.0
"""Weights of eight floating-point bits, with a scale for the tensor, for each output, or for each block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spon_plugin.weights.scaled import ScaledWeight


@dataclass(frozen=True, eq=False)
class Fp8Weight(ScaledWeight):
    """See `ScaledWeight`; codes are float8 (e4m3 or e5m2) ``[in_features, out_features]``."""

    format = "fp8"
    code_dtype = torch.float8_e4m3fn
