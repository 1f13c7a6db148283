# SPDX-License-Identifier: Apache-2.0
"""The formats with scales, by their names in tables of kernels."""

from __future__ import annotations

from spon_plugin.weights.fp8 import Fp8Weight
from spon_plugin.weights.int4 import Int4Weight
from spon_plugin.weights.int8 import Int8Weight
from spon_plugin.weights.scaled import ScaledWeight

SCALED: dict[str, type[ScaledWeight]] = {kind.format: kind for kind in (Int8Weight, Int4Weight, Fp8Weight)}
