# SPDX-License-Identifier: Apache-2.0
"""A streaming histogram of magnitudes: fixed memory, any number of tokens, any range."""

from __future__ import annotations

import torch
from torch import Tensor

# A bin is one bfloat16 value: the upper 16 bits of a float32, without the sign. Equal relative width (1/128) over the
# whole range, exact for bf16 activations, and no range has to be known beforehand.
_SHIFT = 16
BINS = 1 << 15
_INFINITY_BIN = 0x7F80


class MagnitudeHistogram:
    """Counts of ``|x|`` in 32,768 bins of equal relative width (256 KiB).

    Example:
        >>> histogram = MagnitudeHistogram()
        >>> histogram.update(torch.tensor([0.5, -1.0, 2.0, -4.0]))
        >>> 0.5 <= histogram.quantile(0.5) <= 2.0
        True
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    def update(self, x: Tensor) -> None:
        """Count the magnitudes of `x`, of any shape and floating dtype. NaN and infinity are not counted."""
        bits = x.detach().abs().float().contiguous().view(torch.int32).flatten() >> _SHIFT
        counts = torch.bincount(bits, minlength=BINS).cpu()
        counts[_INFINITY_BIN:] = 0
        self.counts += counts

    def quantile(self, q: float) -> float:
        """The magnitude below which a share `q` of the values lies; linear inside a bin. 0.0 for ``q <= 0``.

        Raises:
            ValueError: nothing was counted, or ``q >= 1``.
        """
        if q <= 0:
            return 0.0
        total = self.total
        if not total or q >= 1:
            raise ValueError(f"quantile({q}) of {total} values")
        cumulative = self.counts.cumsum(0)
        target = q * total
        index = int(torch.searchsorted(cumulative, torch.tensor(target, dtype=torch.float64)))
        before = int(cumulative[index - 1]) if index else 0
        lower, upper = _edge(index), _edge(index + 1)
        return lower + (upper - lower) * (target - before) / int(self.counts[index])


def _edge(index: int) -> float:
    """The lower edge of a bin."""
    return torch.tensor(index << _SHIFT, dtype=torch.int32).view(torch.float32).item()
