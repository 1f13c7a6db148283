# SPDX-License-Identifier: Apache-2.0
"""What formats with scales share: groups of inputs, a scale for each group and output, perhaps a zero point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spon_plugin.weights.row_weight import RowWeight


@dataclass(frozen=True, eq=False)
class ScaledWeight(RowWeight):
    """``W^T[i, o] = (codes[i, o] - zeros[g, o]) * scales[g, o]`` with ``g`` the group of input ``i``, in float32.

    A host that dequantizes in a narrower dtype rounds the same product, so its values are ``dense(that dtype)``.

    Attributes:
        codes: ``[in_features, bytes of a row]``.
        scales: ``[groups, out_features]``, floating point.
        zeros: ``[groups, out_features]``, in the unit of the codes; None for none.
        group_size: inputs in a group, where groups are runs of inputs.
        group_of_row: int32 ``[in_features]``, the group of each input, where they are not (GPTQ's act-order).
    """

    scales: Tensor
    zeros: Tensor | None = None
    group_size: int = 0
    group_of_row: Tensor | None = None

    @property
    def out_features(self) -> int:
        """See `RowWeight.out_features`."""
        return int(self.scales.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """float32: a product of a code and a scale is exact in it, or rounded once."""
        return torch.float32

    def rows(self, index: Tensor | slice) -> Tensor:
        """See `RowWeight.rows`."""
        values = self._values(self.codes[index])
        group: Any = slice(None)  # a single one, for all rows
        if self.scales.shape[0] > 1:
            group = self._groups()[index].long()
        if self.zeros is not None:
            values = values - self.zeros[group].float()
        return values * self.scales[group].float()

    def shard(self, start: int, stop: int) -> RowWeight:
        """See `RowWeight.shard`."""
        zeros = None if self.zeros is None else self.zeros[:, start:stop]
        return replace(self, codes=self.codes[:, start:stop], scales=self.scales[:, start:stop], zeros=zeros)

    def _values(self, codes: Tensor) -> Tensor:
        """Rows of codes as float32 ``[n, out_features]``, before zero points and scales."""
        return codes.float()

    def _groups(self) -> Tensor:
        """The group of each input, ``[in_features]``."""
        if self.group_of_row is not None:
            return self.group_of_row
        return torch.arange(self.in_features, device=self.codes.device) // self.group_size
