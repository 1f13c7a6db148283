# SPDX-License-Identifier: Apache-2.0
"""Weights whose rows cannot be read: packed, sharded or elsewhere. Right, not fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spon_plugin.errors import SponError
from spon_plugin.weights.product import chunk_elements, product, without_autocast


@dataclass(frozen=True, eq=False)
class Opaque:
    """A linear map that can be called and, at most, decoded as a whole.

    Attributes:
        call: maps ``[rows, in_features]`` in `dtype` to ``[rows, out_features]``; may add a bias.
        in_features: length of an input.
        out_features: length of an output.
        dtype: that the map computes in.
        reason: why its rows cannot be read, for reports and errors.
        decode: gives the whole weight, ``[out_features, in_features]`` in floating point; None where nobody can.
    """

    call: Callable[[Tensor], Tensor]
    in_features: int
    out_features: int
    dtype: torch.dtype
    reason: str = "a format without rows"
    decode: Callable[[], Tensor] | None = None

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole, ``[in_features, out_features]``, as `RowWeight.dense`.

        Raises:
            SponError: nobody can decode it.
        """
        if self.decode is None:
            raise SponError.of("weight", self.reason, "one whose values can be read")
        decoded = self.decode().detach().t()
        return decoded if dtype is None else decoded.to(dtype)

    def product(self, alpha: Tensor) -> Tensor:
        """``W alpha``, float32 ``[out_features]``, as `RowWeight.product`.

        What nobody can decode is asked, as ``call(alpha) - call(0)`` in its own dtype; differentiable if the map is.

        Args:
            alpha: ``[in_features]``, on the device that the map takes.
        """
        if self.decode is not None:
            return product(self, alpha)
        # Two rows, because several 8-bit kernels refuse or re-quantize a single one.
        rows = torch.stack([alpha, torch.zeros_like(alpha)]).to(self.dtype)
        with without_autocast(alpha.device):
            out = self.call(rows).float()
        return out[0] - out[1]

    def parts(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight as ``[some outputs, in_features]`` in `dtype`, part by part."""
        whole = self.dense().t()
        for part in whole.split(max(1, chunk_elements(whole.device) // max(1, self.in_features))):
            yield part.to(dtype)
