# SPDX-License-Identifier: Apache-2.0
"""ActTail (arXiv 2603.12272): top-k, each projection's share of the target by the spectrum of its weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Sparsifier, Statistics, linear_by_linear, readable_weight
from spon_plugin.sparsifiers.topk import TopKFitted

SPREAD = 0.2
"""AlphaPruning's epsilon for Wanda: shares lie between 1 - epsilon and 1 + epsilon times the target."""
MOST = 0.99
_BISECTIONS = 60


def tail_exponent(weight: Tensor) -> float:
    """The exponent of the power law that the larger half of the eigenvalues of ``W W^T`` follows, by Hill's estimator.

    ``alpha = 1 + n / sum_{i > m} log(l_i / l_m)`` with the eigenvalues `l` in rising order, `m` the middle one and `n`
    how many there are from it on. The heavier the tail, the smaller it is.

    Args:
        weight: ``[out_features, in_features]``.
    """
    eigenvalues = torch.linalg.svdvals(weight.float()).square().double().flip(0)
    tail = eigenvalues[len(eigenvalues) // 2 :].clamp(min=torch.finfo(torch.float64).tiny).log()
    return float(1 + len(tail) / (tail - tail[0]).sum().clamp(min=1e-9))


def allocate(
    exponents: Mapping[str, float], weights: Mapping[str, int], sparsity: float, spread: float = SPREAD
) -> dict[str, float]:
    """Shares that rise with the exponents on a straight line, scaled to the model-wide target.

    ``share_l = c (1 - spread + 2 spread (alpha_l - min) / (max - min))``, at most `MOST` unless the target is more.

    Args:
        exponents: module path -> `tail_exponent`.
        weights: module path -> number of weights, by which shares count.
        sparsity: the target, in [0, 1).
        spread: how far shares lie apart, in [0, 1).

    Returns:
        Module path -> share of the inputs to drop.
    """
    least, most = min(exponents.values()), max(exponents.values())
    width = most - least
    lines = {
        path: 1 + spread * (2 * (value - least) / width - 1) if width else 1.0 for path, value in exponents.items()
    }
    total, ceiling = sum(weights.values()), max(MOST, sparsity)

    def at(scale: float) -> dict[str, float]:
        return {path: min(scale * line, ceiling) for path, line in lines.items()}

    low, high = 0.0, 1 / (1 - spread)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        met = sum(share * weights[path] for path, share in at(middle).items())
        low, high = (middle, high) if met < sparsity * total else (low, middle)
    return at((low + high) / 2)


class ActTail(Sparsifier):
    """``S(x)_i = x_i if |x_i| is among the token's k_l largest else 0``, `k_l` by the linear; evaluation only.

    From the paper, as its abstract gives it (the text itself was out of reach): the top k by magnitude for each token,
    with a sparsity for each projection that follows the exponent of the heavy tail of its weight's empirical spectral
    density, so that projections with heavier tails keep more.

    Our reading, where no formula was to be had: exponent and line are those of AlphaPruning (arXiv 2410.10912,
    github.com/haiquanlu/AlphaPruning: Hill's estimator over the larger half of the eigenvalues, its ``alpha_mid``; a
    straight line between 1 - epsilon and 1 + epsilon times the target, its ``ww_sparsity`` by layer), which shares its
    last author and the theory; epsilon is AlphaPruning's 0.2 for Wanda, untuned.
    """

    name, title = "acttail", "ActTail"

    def complete(self, model: nn.Module, statistics: Statistics, progress: Progress) -> None:
        """See `Sparsifier.complete`: the spectra of the weights."""
        paths = [path for site in statistics.sites for path in site.modules]
        for done, path in enumerate(paths, start=1):
            statistics.own[path] = tail_exponent(readable_weight(model, path))
            progress(done, len(paths))

    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> TopKFitted:
        """See `Sparsifier.at`."""
        alone = linear_by_linear(statistics)
        shares = allocate(statistics.own, {site.name: site.weights for site in alone.sites}, sparsity)
        return TopKFitted(self.name, alone, sparsity, shares)
