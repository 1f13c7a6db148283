# SPDX-License-Identifier: Apache-2.0
"""Conv1D of transformers (GPT-2), whose weight lies ``[in_features, out_features]``, and our `SparseConv1D`."""

from __future__ import annotations

from typing import Any

from torch import nn

from spon_plugin.weights.dense import DenseWeight
from spon_plugin.weights.importers.kind import Kind, Unreadable
from spon_plugin.weights.importers.torch_linear import why_not_plain
from spon_plugin.weights.row_weight import RowWeight


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, known by its name so that the core imports no host."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and hasattr(module, "nf")


def _features(module: Any) -> tuple[int, int]:
    if hasattr(module, "nx"):
        return int(module.nx), int(module.nf)
    return int(module.weight.shape[0]), int(module.nf)


def _weight(module: Any) -> RowWeight | Unreadable:
    reason = why_not_plain(module)
    return Unreadable(reason) if reason else DenseWeight(module.weight)


CONV1D = Kind("Conv1D", is_conv1d, _features, _weight)
SPARSE_CONV1D = Kind("SparseConv1D", lambda module: type(module).__name__ == "SparseConv1D", _features, _weight)
