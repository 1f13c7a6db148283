# SPDX-License-Identifier: Apache-2.0
"""How sparse a run was: what the masks dropped, counted linear by linear."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class SparsityCounter:
    """How many input entries each linear's mask dropped, over the tokens that were masked."""

    def __init__(self) -> None:
        self._dropped: dict[str, Tensor] = {}
        self._total: dict[str, int] = {}

    def add(self, path: str, keep: Tensor) -> None:
        """Count one mask, bool ``[..., in_features]``, of the linear at `path`."""
        self.add_dropped(path, keep.numel() - keep.sum(), keep.numel())

    def add_dropped(self, path: str, dropped: Tensor, total: int) -> None:
        """Count `dropped`, a whole number that stays on its device, out of `total` entries of the linear at `path`."""
        self._dropped[path] = self._dropped.get(path, torch.zeros_like(dropped)) + dropped
        self._total[path] = self._total.get(path, 0) + total

    def per_module(self) -> dict[str, float]:
        """Achieved sparsity, 0 to 1, of every linear that saw a token."""
        return {path: int(self._dropped[path]) / total for path, total in self._total.items() if total}

    def overall(self, weights: Mapping[str, int]) -> float:
        """Achieved sparsity of the model: the linears weighted by their number of weights.

        Args:
            weights: module path -> number of weights.
        """
        measured = self.per_module()
        total = sum(weights[path] for path in measured)
        return sum(measured[path] * weights[path] for path in measured) / total if total else 0.0
