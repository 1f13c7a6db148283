# SPDX-License-Identifier: Apache-2.0
"""How long a command is likely to take on this machine."""

from __future__ import annotations

from typing import Any

import torch

from spon_cli.output import note
from spon_plugin import machine
from spon_plugin.sparsifiers.registry import plain_name
from spon_plugin.sparsifiers.sensitivity import Sensitivity
from spon_plugin.training.recipe import Recipe

READ, FELT, TRAINED, COMPARED = 1, 3, 3, 3
"""Passes through the model of a token that is read, read for what the output feels (forward, backward), trained on
(teacher, student, backward), or evaluated on with its dense, TEAL and SPON models."""

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


def calibration_passes(method: str, tokens: int) -> int:
    """Passes of tokens that a method calibrates with."""
    return (FELT if plain_name(method) == Sensitivity.name else READ) * tokens


def training_passes(recipe: Recipe) -> int:
    """Passes of the tokens that a recipe trains on."""
    return TRAINED * recipe.steps * recipe.batch_size * recipe.window


def schedule(recipe: Recipe) -> str:
    """A recipe in words: ``150 steps of 2 x 256 tokens``."""
    return f"{recipe.steps} steps of {recipe.batch_size} x {recipe.window} tokens"


def announce(plan: str) -> None:
    """Say what kind of machine this is and what will be done, before the first of it.

    Args:
        plan: a sentence without its full stop.
    """
    note(f"{machine.description()}. {plan}.")


def announce_time(model: Any, passes: int) -> None:
    """Say how long passes of tokens through `model` are likely to take here, before the first of them."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    time = in_words(likely_minutes(parameters, passes, machine.compute_dtype(model.dtype, model.device), model.device))
    size = f"{parameters / 1e6:.0f} million parameters"
    note(f"{size}, computing in {machine.name_of(model.dtype)}: {time} by this machine's speed in products.")


def in_words(minutes: float) -> str:
    """``about 6 minutes``, or ``about a minute`` and less."""
    return "about a minute" if minutes < 1.5 else f"about {minutes:.0f} minutes"
