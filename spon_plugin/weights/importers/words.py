# SPDX-License-Identifier: Apache-2.0
"""Codes packed in 32-bit words, as GPTQ, AWQ and compressed-tensors pack them, and formats made of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spon_plugin.weights.int4 import Int4Weight, pack_nibbles
from spon_plugin.weights.int8 import Int8Weight
from spon_plugin.weights.scaled import ScaledWeight


def unpack_words(words: Tensor, bits: int, count: int, order: Sequence[int] | None = None) -> Tensor:
    """Unsigned codes out of words, the first in the lowest bits.

    Args:
        words: int32 ``[rows, ceil(count * bits / 32)]``.
        bits: of a code, 4 or 8.
        count: codes in a row.
        order: which code of a word lies in its place i; None for code i.

    Returns:
        uint8 ``[rows, count]``.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    if order is not None:
        codes = codes[..., torch.tensor(order, device=words.device).argsort()]
    return codes.flatten(1)[:, :count].to(torch.uint8)


def integer_weight(
    bits: int,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    group_of_row: Tensor | None = None,
) -> ScaledWeight:
    """An `Int4Weight` or `Int8Weight`.

    Args:
        bits: 4 or 8.
        codes: unsigned, uint8 ``[in_features, out_features]``.
        scales: ``[groups, out_features]``.
        zeros: unsigned, ``[groups, out_features]``; None for the middle of the codes' range.
        group_size: inputs of a group.
        group_of_row: see `ScaledWeight`; dropped where it says what `group_size` says.
    """
    if group_of_row is not None:
        runs = torch.arange(group_of_row.numel(), device=group_of_row.device) // group_size
        if torch.equal(runs, group_of_row.long()):
            group_of_row = None
    middle = 2 ** (bits - 1)
    if zeros is not None and bool((zeros == middle).all()):
        zeros = None
    scales = scales.contiguous()
    if bits == 4:
        return Int4Weight(pack_nibbles(codes), scales, zeros, group_size, group_of_row)
    signed = (codes.to(torch.int16) - middle).to(torch.int8)
    zeros = None if zeros is None else zeros.to(torch.int16) - middle
    return Int8Weight(signed, scales, zeros, group_size, group_of_row)
