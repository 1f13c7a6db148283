# SPDX-License-Identifier: Apache-2.0
"""Which model an adapter was made for: its name, and a digest of its weights that is cheap to take."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spon_plugin.errors import SponError
from spon_plugin.files import user_path
from spon_plugin.weights.linears import is_linear

_HEAD = 64
_SAME_ROUNDED = (torch.float32, torch.bfloat16, torch.float64)


def base_of(peft: Mapping[str, Any], adapter: str | Path, remedy: str = "") -> str:
    """The base model that an adapter names.

    Args:
        peft: PEFT's part of its config.
        adapter: its name, for the error.
        remedy: likewise.

    Raises:
        SponError: it names none, or a path that has moved.
    """
    base = peft.get("base_model_name_or_path")
    field = f"{adapter}: base_model_name_or_path"
    if not base:
        raise SponError.of(field, base, "the base model's name or path", remedy)
    path = user_path(base, field)
    if path.is_absolute() and not path.exists():
        raise SponError.of(field, base, "a directory that exists", remedy)
    return str(base)


def weights_digest(model: nn.Module, rounded: torch.dtype = torch.float32) -> str:
    """SHA-256 of the parameters' names, shapes and first numbers, to tell whether two runs had the same model.

    Args:
        model: any; what it holds once under two names counts once.
        rounded: the numbers are taken in this dtype.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        head = parameter.detach().flatten()[:_HEAD].to(rounded).float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + head.numpy().tobytes())
    return digest.hexdigest()


def base_digest(model: nn.Module) -> str:
    """`weights_digest` in bfloat16: the same for a checkpoint in bfloat16 and its float32 copy, and the other way.

    Returns:
        The digest; empty where the numbers at hand do not tell: a quantized model's, float16's (whose small numbers are
        coarser than bfloat16's), and those that are offloaded.
    """
    weights = [getattr(module, "weight", None) for module in model.modules() if is_linear(module)]
    if all(_has_numbers(tensor) for tensor in (*weights, *model.parameters())):
        return weights_digest(model, torch.bfloat16)
    return ""


def _has_numbers(tensor: Any) -> bool:
    """Whether a tensor's own numbers are the weight's: torchao's, in a class of its own, say a dtype and hold codes."""
    if not isinstance(tensor, torch.Tensor) or type(tensor.data) is not torch.Tensor:
        return False
    return tensor.dtype in _SAME_ROUNDED and not tensor.is_meta
