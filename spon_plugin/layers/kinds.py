# SPDX-License-Identifier: Apache-2.0
"""The kinds of linear layers that can be sparsified."""

from __future__ import annotations

from torch import nn

from spon_plugin.errors import SponError


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D (GPT-2), known by its name so that the core imports no host."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer that can be sparsified: `torch.nn.Linear`, a subclass of it, or Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linear_features(module: nn.Module, name: str = "layer") -> tuple[int, int]:
    """``(in_features, out_features)`` of a linear layer.

    Raises:
        SponError: `module` is not a linear layer.
    """
    if is_conv1d(module) or type(module).__name__ == "SparseConv1D":
        return int(module.weight.shape[0]), int(module.weight.shape[1])  # type: ignore[union-attr, arg-type, index]
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    raise SponError.of(name, type(module).__name__, "a linear layer (torch.nn.Linear or Conv1D)")
