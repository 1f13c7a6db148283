# SPDX-License-Identifier: Apache-2.0
"""Weights of four bits, two outputs a byte, with a scale for each group of inputs and output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spon_plugin.errors import SponError
from spon_plugin.weights.int8 import Int8Weight
from spon_plugin.weights.scaled import ScaledWeight


@dataclass(frozen=True, eq=False)
class Int4Weight(ScaledWeight):
    """See `ScaledWeight`; codes are uint8 ``[in_features, ceil(out_features / 2)]``.

    Byte j of a row holds output 2j in its lower four bits and output 2j + 1 in its upper four, each 0 to 15. Without
    `zeros` the value 8 stands for zero.
    """

    format = "int4"
    code_dtype = torch.uint8
    unit: ClassVar[int] = 2
    middle: ClassVar[int] = 8

    def _values(self, codes: Tensor) -> Tensor:
        return unpack_nibbles(codes, self.out_features).float()

    def _cut(self, start: int, stop: int) -> Tensor:
        if start % 2 or (stop % 2 and stop != self.out_features):
            raise SponError.of("shard", (start, stop), "even outputs, as two share a byte")
        return self.codes[:, start // 2 : (stop + 1) // 2]


def pack_nibbles(values: Tensor) -> Tensor:
    """Values 0 to 15, ``[rows, columns]``, as uint8 ``[rows, ceil(columns / 2)]``, the even columns in the low bits."""
    values = values.to(torch.uint8)
    if values.shape[1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[:, ::2] | values[:, 1::2] << 4


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 ``[rows, columns]``."""
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :columns]


def narrow(weight: Int8Weight) -> Int4Weight | None:
    """`weight` in half the bytes, value for value; None where a code does not fit into four bits.

    Args:
        weight: int8, as hosts without a packed layout keep four bits.
    """
    codes = weight.codes
    if bool((codes < -8).any()) or bool((codes > 7).any()):
        return None
    zeros = None
    if weight.zeros is not None and bool(weight.zeros.any()):
        zeros = weight.zeros.to(torch.int16) + 8
        fits = bool((zeros >= 0).all()) and bool((zeros <= 15).all())
        zeros = zeros.to(torch.uint8 if fits else torch.int16)
    packed = pack_nibbles(codes.to(torch.int16) + 8)
    return Int4Weight(packed, weight.scales, zeros, weight.group_size, weight.group_of_row, weight.offsets)
