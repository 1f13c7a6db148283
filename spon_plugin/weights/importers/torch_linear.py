# SPDX-License-Identifier: Apache-2.0
"""`torch.nn.Linear` and its subclasses with a floating-point weight."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spon_plugin.weights.dense import DenseWeight
from spon_plugin.weights.importers.kind import Kind, Unreadable, named_features
from spon_plugin.weights.row_weight import RowWeight

# Layers with a forward of their own -> whether it multiplies the weight as it is (Falcon's does).
_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def is_plain_matrix(weight: Any) -> bool:
    """Whether `weight` is a floating-point matrix whose elements are the values themselves.

    Not one that is packed, sharded (DTensor, FSDP, ZeRO-3), or of one byte an element, which comes with scales.
    """
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.is_floating_point()
        and weight.dim() == 2
        and weight.element_size() > 1
    )


def is_offloaded(module: Any) -> bool:
    """Whether accelerate brings the weight of `module` (from CPU memory or disk) only while it is called."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.is_meta and hasattr(module, "_hf_hook")


def why_not_plain(module: Any) -> str | None:
    """Why the weight of `module` is not its values, here and now; None if it is."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return "no weight tensor"
    if is_offloaded(module):
        return "offloaded"
    if is_plain_matrix(weight):
        return None
    return f"{type(weight).__name__} of {weight.dtype}, shape {tuple(weight.shape)}"


def _weight(module: Any) -> RowWeight | Unreadable:
    reason = why_not_plain(module)
    if reason is None and not _multiplies_as_it_is(module):
        # Fake quantization, ternary weights, clipped inputs, a scale: what it multiplies is not what it holds.
        reason = f"{type(module).__name__} has a forward of its own"
    return Unreadable(reason) if reason else DenseWeight(module.weight.t())


@torch.no_grad()
def _multiplies_as_it_is(module: Any) -> bool:
    """Whether a layer computes ``x W^T + b``; one with a forward of its own is asked, once."""
    if type(module).forward is nn.Linear.forward or type(module).__name__ in ("SparseLinear", "RowLinear"):
        return True
    if module.weight.is_meta:
        return False
    if module not in _KNOWN:
        weight = module.weight
        x = torch.linspace(-3, 3, 2 * weight.shape[1], device=weight.device).view(2, -1).to(weight.dtype)
        expected = F.linear(x, weight, module.bias)
        found = type(module).forward(module, x)  # past hooks, which may mask
        close = 4 * torch.finfo(weight.dtype).eps * weight.shape[1] ** 0.5
        _KNOWN[module] = found.shape == expected.shape and bool(
            (found - expected).abs().max() <= close * expected.abs().max()
        )
    return _KNOWN[module]


LINEAR = Kind("Linear", lambda module: isinstance(module, nn.Linear), named_features, _weight)
