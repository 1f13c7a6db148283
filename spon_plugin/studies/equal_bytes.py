# SPDX-License-Identifier: Apache-2.0
"""What share of uniform TEAL's gap a row closes, TEAL taken where it saves as many bytes on the text as the row does.

The rows of one target do not save alike: trained alphas lift entries over the thresholds, masks that were matched on
one text keep more of another, and some methods read more than weights. TEAL's loss over the dense model, in nats, is
nearly a power of the share that it saves, so it is interpolated between TEAL's rows as a straight line of logarithms,
below the first along the first two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spon_plugin.studies.bootstrap import Interval, excludes_zero, interval, window_losses
from spon_plugin.studies.evaluation import share_recovered

Result = Mapping[str, Any]
"""Of one row on one text: `Measurement.as_dict`, with ``windows`` where they were kept."""


class Between(NamedTuple):
    """Where a row lies among TEAL's on a text.

    Attributes:
        dense: the dense model's result.
        first: of the TEAL row before it.
        second: of the one after it.
        place: 0 at the first, 1 at the second, in logarithms of what is saved; negative before the first.
    """

    dense: Result
    first: Result
    second: Result
    place: float

    @classmethod
    def of(cls, own: Result, dense: Result | None, teal: Sequence[Result]) -> Between | None:
        """The place of the row with the result `own`.

        Args:
            own: its result.
            dense: the dense model's; None or without perplexity gives None.
            teal: results of uniform TEAL without alpha, in any order.

        Returns:
            None where TEAL has fewer than two rows that lose anything, or saves less than this row in all of them.
        """
        if dense is None or not dense["perplexity"] or own["saved"] <= 0:
            return None
        above = [r for r in teal if r["perplexity"] and r["perplexity"] > dense["perplexity"] and r["saved"] > 0]
        above.sort(key=lambda result: result["saved"])
        if len(above) < 2 or own["saved"] > above[-1]["saved"]:
            return None
        index = next(i for i in range(1, len(above)) if own["saved"] <= above[i]["saved"])
        first, second = above[index - 1], above[index]
        start, end = math.log(first["saved"]), math.log(second["saved"])
        return cls(dense, first, second, (math.log(own["saved"]) - start) / (end - start))

    def share(self, own: Result) -> float | None:
        """The share of TEAL's gap that the row closes; None where it has no perplexity."""
        dense = self.dense["perplexity"]
        low, high = (math.log(math.log(result["perplexity"] / dense)) for result in (self.first, self.second))
        teal = dense * math.exp(math.exp(low + (high - low) * self.place))
        return share_recovered(dense, teal, own["perplexity"])

    def interval(self, own: Result) -> Interval | None:
        """Of `share`, by a bootstrap over the windows of all four results; None where they were not kept."""
        means = self._losses(own)

        def share(mean: Tensor) -> Tensor:
            (dense, _, _, row), teal = mean.exp(), self._teal(mean).exp()
            return (teal - row) / (teal - dense)

        return None if means is None else interval(means, share)

    def is_certain(self, own: Result) -> bool | None:
        """Whether the row's loss differs from TEAL's there, at 95%; None where windows were not kept."""
        means = self._losses(own)
        return None if means is None else excludes_zero(interval(means, lambda mean: mean[3] - self._teal(mean)))

    def _losses(self, own: Result) -> Tensor | None:
        return window_losses(self.dense, self.first, self.second, own)

    def _teal(self, mean: Tensor) -> Tensor:
        dense, first, second, _ = mean
        low, high = (first - dense).log(), (second - dense).log()
        return dense + torch.exp(low + (high - low) * self.place)
