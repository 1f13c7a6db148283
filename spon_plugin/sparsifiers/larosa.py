# SPDX-License-Identifier: Apache-2.0
"""LaRoSA (arXiv 2507.01299, github.com/alibaba/EfficientAI): top-k after a rotation of each block's inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.decoder.sites import Site
from spon_plugin.errors import SponError
from spon_plugin.masking import zero_dropped
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Sparsifier, Statistics
from spon_plugin.sparsifiers.topk import TopKFitted, top_k_mask

# Released code: sites that read the residual stream get 0.8 of the target, those inside attention and MLP 1.2.
RATIO = 1.2 / 0.8


class SecondMoment:
    """``sum_t x_t x_t^T``, float32 ``[in_features, in_features]``."""

    def __init__(self, size: int) -> None:
        self.total = torch.zeros(size, size)

    def update(self, rows: Tensor) -> None:
        """Add ``[tokens, in_features]``."""
        rows = rows.float()
        self.total += (rows.t() @ rows).cpu()


def principal_axes(moment: Tensor) -> Tensor:
    """An orthogonal matrix whose columns are the eigenvectors of a second moment, float32 ``[size, size]``."""
    return torch.linalg.eigh(moment.double()).eigenvectors.float()


def reads_residual(site: Site) -> bool:
    """Whether a site reads the (normalized) residual stream, which can be rotated: the first of attention and MLP."""
    return site.role in ("attn_in", "mlp_in")


class LarosaFitted(TopKFitted):
    """See `Larosa`.

    Attributes:
        rotations: block -> ``Q`` ``[in_features, in_features]``.
    """

    def __init__(
        self,
        name: str,
        statistics: Statistics,
        sparsity: float,
        shares: dict[str, float],
        rotations: dict[str, Tensor],
    ) -> None:
        super().__init__(name, statistics, sparsity, shares)
        self.rotations = rotations

    def sparse_input(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `SparseMethod.sparse_input`; the mask is that of the rotated entries."""
        if not reads_residual(site):
            return super().sparse_input(site, x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rotation = self.rotations[site.block].to(wide)
        rotated = wide @ rotation
        keep = top_k_mask(rotated, self.shares[site.name])
        return (zero_dropped(rotated, keep) @ rotation.t()).to(x.dtype), keep

    @property
    def extra_reads(self) -> int:
        """One residual adapter ``Q_l^T Q_{l+1}`` per block, read for every token; the rest is folded into weights."""
        return sum(rotation.numel() for rotation in self.rotations.values())


class Larosa(Sparsifier):
    """``W S_k(x Q) Q^T``: `Q` holds the principal axes of the block's input, `S_k` keeps a token's top k.

    As released: one rotation per block, from the second moment of the attention's input, serves attention and MLP; the
    inputs of the output and down projections cannot be rotated and keep their top k; their share of dropped entries is
    1.5 times that of the rotated ones. We scale both so that the model-wide target holds (the released 0.8 and 1.2 give
    less than it). One ``[hidden, hidden]`` matrix per block moves the residual stream from one basis to the next: it is
    charged as extra bytes, read for every token.
    """

    name, title = "larosa", "LaRoSA"

    def observer(self, model: nn.Module, site: Site, statistics: Statistics) -> Any:
        """See `Sparsifier.observer`."""
        known = statistics.own.values()
        first = reads_residual(site) and not any(own.block == site.block for own in known)
        return _BlockMoment(site.block, site.in_features) if first else None

    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> LarosaFitted:
        """See `Sparsifier.at`."""
        moments: list[_BlockMoment] = list(statistics.own.values())
        rotations = {moment.block: moment.axes for moment in moments}
        for site in statistics.sites:
            if reads_residual(site) and len(rotations[site.block]) != site.in_features:
                expected = f"{len(rotations[site.block])}, as at the block's first site"
                raise SponError.of(f"{site.name}: in_features", site.in_features, expected, "larosa needs one width.")
        return LarosaFitted(self.name, statistics, sparsity, spread(statistics.sites, sparsity), rotations)


class _BlockMoment(SecondMoment):
    def __init__(self, block: str, size: int) -> None:
        super().__init__(size)
        self.block = block
        self._axes: Tensor | None = None

    @property
    def axes(self) -> Tensor:
        """`principal_axes`, computed once."""
        if self._axes is None:
            self._axes = principal_axes(self.total)
        return self._axes


def spread(sites: list[Site], sparsity: float, ratio: float = RATIO, most: float = 0.95) -> dict[str, float]:
    """Site name -> share, `ratio` times as much at sites that are not rotated, so that the model has `sparsity`.

    No share exceeds `most`, unless the target does; the rotated sites make up for it.
    """
    rotated = sum(site.weights for site in sites if reads_residual(site))
    other = sum(site.weights for site in sites) - rotated
    most = max(most, sparsity)
    high = min(ratio * sparsity * (rotated + other) / (rotated + ratio * other), most)
    low = (sparsity * (rotated + other) - high * other) / rotated if rotated else 0.0
    return {site.name: low if reads_residual(site) else high for site in sites}
