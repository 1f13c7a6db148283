# SPDX-License-Identifier: Apache-2.0
"""Sparsification methods behind one interface: calibrate once, fit at any sparsity, run with or without alpha."""

from __future__ import annotations

from spon_plugin.sparsifiers.base import Fitted, Sparsifier, Statistics
from spon_plugin.sparsifiers.registry import SPARSIFIERS, adapter_methods, get_sparsifier, method_names
from spon_plugin.sparsifiers.thresholds import ThresholdFitted, ThresholdSparsifier

__all__ = [
    "SPARSIFIERS",
    "Fitted",
    "Sparsifier",
    "Statistics",
    "ThresholdFitted",
    "ThresholdSparsifier",
    "adapter_methods",
    "get_sparsifier",
    "method_names",
]
