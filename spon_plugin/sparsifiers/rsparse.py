# SPDX-License-Identifier: Apache-2.0
"""R-Sparse (arXiv 2504.19449, github.com/VITA-Group/R-Sparse): large inputs meet the weight, small ones a low rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.adapter.mask import Mask
from spon_plugin.decoder.sites import Site
from spon_plugin.decoder.sparsity import SparsityCounter
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Statistics, readable_weight
from spon_plugin.sparsifiers.thresholds import ThresholdFitted, ThresholdSparsifier, column_norms
from spon_plugin.sparsifiers.wina import ScoreHistogram
from spon_plugin.weights.linears import linear_features

# The share of a layer's budget that goes to the sparse part. The paper searches it per layer; the released result for
# Llama-3-8B at 50% has a mean of 0.96.
RATIO = 0.96


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix by one of that rank, as two factors.

    Args:
        weight: ``[out_features, in_features]``.
        rank: at most the smaller side.

    Returns:
        ``A [out_features, rank]`` and ``B [rank, in_features]``, float32, with ``A @ B`` the approximation. The last r
        columns of A and rows of B are those of the largest singular values.
    """
    wide = weight.shape[0] < weight.shape[1]
    matrix = weight.detach().double()
    # The eigenvectors of the smaller Gram matrix are the singular vectors of that side.
    gram = matrix @ matrix.t() if wide else matrix.t() @ matrix
    axes = torch.linalg.eigh(gram).eigenvectors[:, len(gram) - rank :]
    pair = (axes, axes.t() @ matrix) if wide else (matrix @ axes, axes.t())
    return pair[0].float(), pair[1].float()


class RSparseFitted(ThresholdFitted):
    """See `RSparse`. `adapter` gives the sparse part alone, without the low-rank remainder.

    Attributes:
        factors: module path -> ``A [out_features, rank]`` and ``B [rank, in_features]``.
    """

    def __init__(
        self,
        name: str,
        statistics: Statistics,
        sparsity: float,
        masks: dict[str, Mask],
        factors: dict[str, tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(name, statistics, sparsity, masks)
        self.factors = factors

    def remainder(self, path: str, dropped: Tensor) -> Tensor | None:
        """``A B (x - S(x))``."""
        a, b = (factor.to(dropped) for factor in self.factors[path])
        return (dropped @ b.t()) @ a.t() if len(b) else None

    @property
    def extra_reads(self) -> int:
        """The factors, read for every token."""
        return sum(a.numel() + b.numel() for a, b in self.factors.values())

    def masked_share(self, counter: SparsityCounter) -> float:
        """What the sparse part leaves unused, less what the factors read: the paper's model-level sparsity."""
        return super().masked_share(counter) - self.extra_reads / sum(self.weights.values())

    def read_share(self, counter: SparsityCounter) -> float:
        """See `Fitted.read_share`; the factors are counted already."""
        return 1 - self.masked_share(counter)


class _SiteScores(ScoreHistogram):
    """Scores of a site, and the factors of its weights, made once for all sparsities."""

    def __init__(self, norms: Tensor) -> None:
        super().__init__(norms)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}


class RSparse(ThresholdSparsifier):
    """``W S(x) + A B (x - S(x))``, `S` keeping ``|x_i| * s_i > tau``, ``A B`` the weight's truncated SVD.

    With ``W = U Sigma V^T``, ``s_i`` is the norm of row i of ``V Sigma`` (released code), that is ``||W_:,i||``. A
    layer's budget of ``(1 - sparsity) * in * out`` numbers is split: a share `ratio` buys kept channels, the rest rank,
    at ``in + out`` numbers each.

    Deviations: one `ratio` for all layers, where the paper searches evolutionarily; the linears of a site share a mask,
    with the norm over their stacked weights; all tokens but the prefix are masked, where the released code leaves the
    first tenth of a prompt dense.

    Args:
        ratio: share of the budget for the sparse part, in (0, 1].
    """

    name, title = "rsparse", "R-Sparse"

    def __init__(self, ratio: float = RATIO) -> None:
        self.ratio = ratio

    def observer(self, model: nn.Module, site: Site, statistics: Statistics) -> Any:
        """See `Sparsifier.observer`."""
        return _SiteScores(column_norms(model, site))

    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> RSparseFitted:
        """See `Sparsifier.at`."""
        masks, factors = {}, {}
        for site in statistics.sites:
            left = (1 - sparsity) * site.weights
            for path in site.modules:
                inputs, outputs = linear_features(model.get_submodule(path))
                most = int((1 - self.ratio) * inputs * outputs / (inputs + outputs))  # at sparsity 0
                rank = int((1 - sparsity) * (1 - self.ratio) * inputs * outputs / (inputs + outputs))
                known = statistics.own[site.name].factors
                if path not in known:
                    known[path] = low_rank(readable_weight(model, path), most)
                factors[path] = known[path][0][:, most - rank :], known[path][1][most - rank :]
                left -= rank * (inputs + outputs)
            # What rounding took from the rank goes to the channels, so that the budget is met.
            masks[site.name] = Mask(statistics.own[site.name].threshold(1 - left / site.weights))
        return RSparseFitted(self.name, statistics, sparsity, masks, factors)
