# SPDX-License-Identifier: Apache-2.0
"""How long a command is likely to take on this machine."""

from __future__ import annotations

import torch

from spon_plugin import machine

READ, TRAINED, COMPARED = 1, 3, 3
"""Passes through the model of a token that is read, trained on (teacher, student, backward), or evaluated on."""

_BESIDE_PRODUCTS = 1.5
"""Time in all over time in products: SmolLM2-135M, float32, AMD EPYC (Zen 3): 65 to 75% of it are products."""


def likely_minutes(parameters: int, passes: int, dtype: torch.dtype, device: torch.device | str) -> float:
    """Minutes for so many passes of tokens through a model, from how fast the machine multiplies right now.

    Args:
        parameters: of the model.
        passes: tokens, each as often as it goes through the model.
        dtype: computed in.
        device: computed on.
    """
    operations = 2 * parameters * passes
    return _BESIDE_PRODUCTS * operations / machine.operations_per_second(dtype, device) / 60


def in_words(minutes: float) -> str:
    """``about 6 minutes``, or ``about a minute`` and less."""
    return "about a minute" if minutes < 1.5 else f"about {minutes:.0f} minutes"
