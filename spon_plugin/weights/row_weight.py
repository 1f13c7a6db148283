# SPDX-License-Identifier: Apache-2.0
"""`RowWeight`: the weight of a linear layer, by input row, in any format whose rows can be decoded one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spon_plugin.errors import SponError
from spon_plugin.weights.product import chunk_elements, product


@dataclass(frozen=True, eq=False)
class RowWeight(ABC):
    """``W^T``, a row for each input, packed along the outputs: a skipped input is skipped bytes.

    Attributes:
        format: its name in tables of kernels, "dense", "int8", "int4" or "fp8".
        unit: outputs that share a byte; shards begin at multiples of it.
        codes: ``[in_features, ...]``, whose first dimension is the inputs'; a view of what a host holds, or a copy.
    """

    format: ClassVar[str]
    unit: ClassVar[int] = 1
    codes: Tensor

    @property
    def in_features(self) -> int:
        """Length of an input."""
        return int(self.codes.shape[0])

    @property
    @abstractmethod
    def out_features(self) -> int:
        """Length of an output."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the decoded values."""

    @property
    def row_bytes(self) -> int:
        """What one skipped input leaves unread, scales apart."""
        return self.codes[0].numel() * self.codes.element_size() if self.in_features else 0

    @abstractmethod
    def rows(self, index: Tensor | slice) -> Tensor:
        """Decode some rows, plainly: the truth that kernels are held to.

        Args:
            index: int64 ``[n]``, or a slice of the inputs.

        Returns:
            ``[n, out_features]`` in `dtype`.
        """

    @abstractmethod
    def shard(self, start: int, stop: int) -> RowWeight:
        """The part of the outputs from `start` to `stop`, as a view.

        Raises:
            SponError: the format cannot be cut there.
        """

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole, ``[in_features, out_features]`` in `dtype`, by default in its own; a view where it is one."""
        return self.rows(slice(None)).to(dtype or self.dtype)

    def product(self, alpha: Tensor) -> Tensor:
        """``W alpha``, differentiable in alpha and, for floating-point codes, in the weight.

        It is computed in float32 (float64 for a float64 weight), whatever autocast says, a part of the outputs at a
        time; only the codes are kept for the backward pass.

        Args:
            alpha: ``[in_features]``, on any device.

        Returns:
            ``[out_features]``, float32 (float64), on the device of the weight.

        Raises:
            SponError: the weight has no values yet (meta device).
        """
        if self.codes.is_meta and not alpha.is_meta:
            raise SponError.of("weight", "the meta device", "values", "Load the model's weights first.")
        return product(self, alpha.to(self.codes.device), self.codes)

    def parts(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight as ``[some outputs, in_features]`` in `dtype`, part by part."""
        size = max(1, chunk_elements(self.codes.device) // max(1, self.in_features))
        size = max(size - size % self.unit, self.unit)
        for start in range(0, self.out_features, size):
            yield self.shard(start, min(start + size, self.out_features)).dense(dtype).t()
