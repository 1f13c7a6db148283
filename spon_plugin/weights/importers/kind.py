# SPDX-License-Identifier: Apache-2.0
"""`Kind`: what the table of linears says about one kind of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from spon_plugin.weights.row_weight import RowWeight


class Kind(NamedTuple):
    """A kind of linear layer, known by its structure.

    Attributes:
        name: as reports show it.
        matches: whether a module is one.
        features: its ``(in_features, out_features)``.
        weight: what it holds: a `RowWeight`, or the reason why its rows cannot be read, or both a reason and how to
            decode the whole as ``[out_features, in_features]``.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    features: Callable[[Any], tuple[int, int]]
    weight: Callable[[Any], RowWeight | Unreadable]


class Unreadable(NamedTuple):
    """Why the rows of a weight cannot be read, and how it is decoded as a whole, if it can be; see `Opaque`."""

    reason: str
    decode: Callable[[], Any] | None = None


def named_features(module: Any) -> tuple[int, int]:
    """The features of a module that names them as `torch.nn.Linear` does."""
    return int(module.in_features), int(module.out_features)
