# SPDX-License-Identifier: Apache-2.0
"""`torch.nn.Linear` and its subclasses with a floating-point weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from spon_plugin.weights.dense import DenseWeight
from spon_plugin.weights.importers.kind import Kind, Unreadable, named_features
from spon_plugin.weights.row_weight import RowWeight

# Subclasses whose own forward multiplies the weight as it is: ours, and transformers' for Falcon.
_AS_LINEAR = ("SparseLinear", "FalconLinear")


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


def why_not_plain(module: Any) -> str | None:
    """Why the weight of `module` is not its values, here and now; None if it is."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return "no weight tensor"
    if weight.is_meta and hasattr(module, "_hf_hook"):
        return "offloaded"
    if is_plain_matrix(weight):
        return None
    return f"{type(weight).__name__} of {weight.dtype}, shape {tuple(weight.shape)}"


def _weight(module: Any) -> RowWeight | Unreadable:
    reason = why_not_plain(module)
    if reason is None and type(module).forward is not nn.Linear.forward and type(module).__name__ not in _AS_LINEAR:
        # Fake quantization, ternary weights, clipped inputs: what it multiplies need not be what it holds.
        reason = f"{type(module).__name__} has a forward of its own"
    return Unreadable(reason) if reason else DenseWeight(module.weight.t())


LINEAR = Kind("Linear", lambda module: isinstance(module, nn.Linear), named_features, _weight)
