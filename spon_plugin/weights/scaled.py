# SPDX-License-Identifier: Apache-2.0
"""What formats with scales share: groups of inputs, a scale for each group and output, perhaps a zero point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from spon_plugin.weights.row_weight import RowWeight

_HALF_PAGE = 2048  # bytes; lines a page apart share a set of the first cache
_LINE = 64  # bytes


@dataclass(frozen=True, eq=False)
class ScaledWeight(RowWeight):
    """``W^T[i, o] = (codes[i, o] - zeros[g, o]) * scales[g, o] + offsets[g, o]``, ``g`` the group of input ``i``.

    It is computed in float32. A host that dequantizes in a narrower dtype rounds the same product, so its values are
    ``dense(that dtype)``.

    Attributes:
        code_dtype: of codes that kernels read; others are decoded.
        codes: ``[in_features, bytes of a row]``.
        scales: ``[groups, out_features]``, floating point.
        zeros: ``[groups, out_features]``, in the unit of the codes; None for the middle of their range.
        group_size: inputs in a group, where groups are runs of inputs.
        group_of_row: int32 ``[in_features]``, the group of each input, where they are not (GPTQ's act-order).
        offsets: ``[groups, out_features]``, floating point, in the unit of the weight (GGUF); None for 0.
    """

    middle: ClassVar[int] = 0
    code_dtype: ClassVar[torch.dtype]

    scales: Tensor
    zeros: Tensor | None = None
    group_size: int = 0
    group_of_row: Tensor | None = None
    offsets: Tensor | None = None

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
            group = self.groups[index].long()
        if self.zeros is not None:
            values = values - self.zeros[group].float()
        elif self.middle:
            values = values - self.middle
        values = values * self.scales[group].float()
        return values if self.offsets is None else values + self.offsets[group].float()

    def shard(self, start: int, stop: int) -> ScaledWeight:
        """See `RowWeight.shard`."""
        cut = {name: getattr(self, name) for name in ("scales", "zeros", "offsets")}
        cut = {name: None if value is None else value[:, start:stop] for name, value in cut.items()}
        return replace(self, codes=self._cut(start, stop), **cut)

    def arranged(self) -> ScaledWeight:
        """The same weight as kernels read it: each row of codes, scales, zeros and offsets is contiguous."""
        zeros, offsets, groups = self.zeros, self.offsets, self.group_of_row
        if zeros is not None and bool((zeros == self.middle).all()):
            zeros = None
        return replace(
            self,
            codes=_apart(self.codes),
            scales=self.scales.contiguous(),
            zeros=None if zeros is None else zeros.contiguous(),
            offsets=None if offsets is None else offsets.contiguous(),
            group_of_row=None if groups is None else groups.contiguous(),
        )

    def _values(self, codes: Tensor) -> Tensor:
        """Rows of codes as float32 ``[n, out_features]``, before zero points and scales."""
        return codes.float()

    def _cut(self, start: int, stop: int) -> Tensor:
        """The codes of some outputs."""
        return self.codes[:, start:stop]

    @property
    def groups(self) -> Tensor:
        """The group of each input, ``[in_features]``."""
        if self.group_of_row is not None:
            return self.group_of_row
        return torch.arange(self.in_features, device=self.codes.device) // self.group_size


def _apart(codes: Tensor) -> Tensor:
    """`codes` by rows, on a CPU with a cache line after each where the rows in flight would push each other out.

    A kernel reads some sixteen rows at once. At distances of half a page all of them share two sets of the first
    cache, of eight lines each.
    """
    length, size = codes.shape[1], codes.element_size()
    if not codes.is_cpu or not length or length * size % _HALF_PAGE:
        return codes.contiguous()
    stride = length + _LINE // size
    if codes.stride() == (stride, 1):
        return codes
    return codes.new_empty((codes.shape[0], stride))[:, :length].copy_(codes)
