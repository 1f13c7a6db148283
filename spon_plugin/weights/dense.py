# SPDX-License-Identifier: Apache-2.0
"""Floating-point weights, as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spon_plugin.weights.row_weight import RowWeight


@dataclass(frozen=True, eq=False)
class DenseWeight(RowWeight):
    """A floating-point matrix of two bytes an element or more.

    Attributes:
        codes: ``[in_features, out_features]``, in any memory layout.
    """

    format = "dense"

    @property
    def out_features(self) -> int:
        """See `RowWeight.out_features`."""
        return int(self.codes.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return self.codes.dtype

    def rows(self, index: Tensor | slice) -> Tensor:
        """See `RowWeight.rows`."""
        return self.codes[index]

    def shard(self, start: int, stop: int) -> DenseWeight:
        """See `RowWeight.shard`."""
        return DenseWeight(self.codes[:, start:stop])
