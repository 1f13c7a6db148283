# SPDX-License-Identifier: Apache-2.0
"""Codes in 32-bit words, by the definition of GPTQ's and AWQ's formats."""

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def to_int32(words):
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def pack(codes, bits, order=None):
    """Codes ``[rows, columns]`` in words along the columns: place i of a word is at bit ``i * bits``."""
    per_word = 32 // bits
    words = codes.long().unflatten(1, (-1, per_word))
    words = words if order is None else words[..., list(order)]
    return to_int32((words << torch.arange(0, 32, bits)).sum(-1))
