# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals by a bootstrap over windows: what the figures would be on other text of the same kind.

Tokens of one window are not independent, so whole windows are drawn, with replacement. What is compared is drawn
together (paired): a window that is hard for one model is hard for the other, and their difference varies far less than
either. The ends are percentiles of the draws, expanded for few windows (Hesterberg, "What Teachers Should Know about
the Bootstrap", The American Statistician 69(4), 2015, section 5.3.2), as plain percentiles are too narrow there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

CONFIDENCE = 0.95
FEWEST = 8
"""Windows without which no interval is given: the draws of a handful say nothing about their tails."""

Interval = tuple[float, float]

_DRAWS = 4000
_CELLS = 1 << 22  # numbers at a time


def interval(means: Tensor, statistic: Callable[[Tensor], Tensor], seed: int = 0) -> Interval | None:
    """The confidence interval of a statistic of means over windows.

    Args:
        means: ``[columns, windows]``, the mean of each quantity within each window; windows of one length.
        statistic: from the means over drawn windows, float64 ``[columns, draws]``, to ``[draws]``.
        seed: of the draws; the same seed draws the same windows whatever the columns are.

    Returns:
        Its ends; None with fewer than `FEWEST` windows, or where something is not finite.
    """
    windows = means.shape[1]
    if windows < FEWEST or not bool(means.isfinite().all()):
        return None
    drawn = [statistic(means.double() @ times.t() / windows) for times in _draws(windows, windows, seed)]
    return _ends(torch.cat(drawn), windows)


def window_losses(*results: Mapping[str, Any]) -> Tensor | None:
    """The mean loss of each result in each window, for `interval`.

    Args:
        results: of one test text, as studies keep them.

    Returns:
        float64 ``[results, windows]``; None where a result has not kept its windows.
    """
    columns = [(result.get("windows") or {}).get("nll") for result in results]
    kept = all(column and None not in column for column in columns)
    return torch.tensor(columns, dtype=torch.float64) if kept else None


def percentile_interval(values: Tensor, share: float, seed: int = 0) -> Interval | None:
    """The confidence interval of a percentile of the tokens' values.

    Args:
        values: ``[windows, tokens]``.
        share: of the tokens that lie below the percentile.
        seed: of the draws.

    Returns:
        As `interval`.
    """
    windows = values.shape[0]
    if windows < FEWEST or not bool(values.isfinite().all()):
        return None
    ordered, order = values.flatten().sort()
    window_of = order // values.shape[1]
    drawn = []
    for times in _draws(windows, values.numel(), seed, _DRAWS // 4):
        below = times[:, window_of].cumsum(1)
        place = torch.searchsorted(below, torch.full((len(times), 1), share * values.numel(), dtype=below.dtype))
        drawn.append(ordered[place.flatten().clamp(max=len(ordered) - 1)].double())
    return _ends(torch.cat(drawn), windows)


def excludes_zero(ends: Interval | None) -> bool:
    """Whether a difference with this interval may be called one."""
    return ends is not None and (ends[0] > 0 or ends[1] < 0)


def _draws(windows: int, cells: int, seed: int, draws: int = _DRAWS) -> Iterator[Tensor]:
    """How often each window is drawn: float64 ``[some draws, windows]``, as many as keep within `_CELLS`.

    Args:
        windows: how many there are to draw from, and are drawn.
        cells: numbers that a draw takes.
        seed: of the draws.
        draws: in all.
    """
    generator = torch.Generator().manual_seed(seed)
    left = draws
    while left:
        count = min(left, max(1, _CELLS // cells))
        drawn = torch.randint(windows, (count, windows), generator=generator)
        times = torch.zeros(count, windows, dtype=torch.float64)
        yield times.scatter_add_(1, drawn, torch.ones(1, dtype=torch.float64).expand_as(drawn))
        left -= count


def _ends(drawn: Tensor, windows: int) -> Interval | None:
    """The ends of the draws: as far out as Student's t with ``windows - 1`` degrees of freedom would have them."""
    if not bool(drawn.isfinite().all()):
        return None
    normal = NormalDist()
    tail = normal.cdf(-math.sqrt(windows / (windows - 1)) * _student(normal.inv_cdf(0.5 + CONFIDENCE / 2), windows - 1))
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=drawn.dtype)).tolist()
    return low, high


def _student(z: float, freedom: int) -> float:
    """The quantile of Student's t where the normal distribution has `z`: three terms of Cornish and Fisher's series."""
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
