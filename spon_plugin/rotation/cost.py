# SPDX-License-Identifier: Apache-2.0
"""What masks cost a model whose residual stream is rotated.

Dropping entry `i` of what a site reads, ``z = Q' x``, moves the output by ``KL ~ f_i z_i^2 / 2`` with the Fisher
information ``f_i = q_i' M q_i``, `M` the second moment of the output's gradient by `x` (`calibration.sensitivity` has
the same form for ``Q = I``). It saves `o` weights, those that the site's linears have per entry. At a price per weight
masks drop what costs less than it saves, so that

    cost(Q) = sum_sites E sum_i min(f_i z_i^2, price * o),

which is small where few entries of a token carry most of what the output feels. Any orthogonal `Q` gives the same dense
model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spon_plugin.calibration.sensitivity import level_below
from spon_plugin.machine import compute_dtype

_TINY = 1e-30
_HALVINGS = 40


@dataclass
class StreamInputs:
    """What a site that reads the residual stream reads on some text.

    Attributes:
        rows: inputs ``[n, hidden]`` of the dense model, after the norm, without its gains.
        moment: ``[hidden, hidden]``, of the gradients by them, summed over the site's linears, mean over tokens.
        outputs: weights that its linears have per entry.
    """

    rows: Tensor
    moment: Tensor
    outputs: int

    def to(self, device: torch.device) -> StreamInputs:
        """The same on a device, in bfloat16 where that is multiplied natively, else in float32."""
        dtype = compute_dtype(torch.bfloat16, device)
        return StreamInputs(self.rows.to(device, dtype), self.moment.to(device, dtype), self.outputs)

    def entry_costs(self, rotation: Tensor, rows: Tensor) -> Tensor:
        """``f_i z_i^2`` of some rows, float32 ``[rows, hidden]``.

        Args:
            rotation: `Q`, float32 ``[hidden, hidden]``.
            rows: which.
        """
        low = rotation.to(self.rows.dtype)
        felt = ((self.moment @ low).float() * rotation).sum(0)
        return felt * (self.rows[rows] @ low).float().square()


def masked_cost(site: StreamInputs, rotation: Tensor, price: float, rows: Tensor) -> Tensor:
    """A site's part of the cost, a scalar with a gradient by the rotation.

    Args:
        site: what it reads.
        rotation: `Q`, float32 ``[hidden, hidden]``.
        price: of a weight.
        rows: which of the site's rows to average over.
    """
    return site.entry_costs(rotation, rows).clamp(max=price * site.outputs).mean(0).sum()


@torch.no_grad()
def price_for(sites: Sequence[StreamInputs], rotation: Tensor, sparsity: float, rows: int = 256) -> float:
    """The price at which masks drop a share `sparsity` of the sites' weights.

    Args:
        sites: what they read.
        rotation: `Q`.
        sparsity: the target, in (0, 1).
        rows: of each site that are looked at.
    """
    return _price(sites, [site.entry_costs(rotation, _some(site, rows)) for site in sites], sparsity)


@torch.no_grad()
def dropped_cost(sites: Sequence[StreamInputs], rotation: Tensor, sparsity: float, rows: int = 256) -> float:
    """What the entries cost that masks drop at a sparsity: an estimate of twice the KL divergence in nats a token.

    Args:
        sites: what they read.
        rotation: `Q`.
        sparsity: the target, in (0, 1).
        rows: of each site that are looked at.
    """
    costs = [site.entry_costs(rotation, _some(site, rows)) for site in sites]
    price = _price(sites, costs, sparsity)
    dropped = (c.where(c < price * site.outputs, 0).mean(0).sum() for site, c in zip(sites, costs, strict=True))
    return float(sum(dropped))


def _price(sites: Sequence[StreamInputs], costs: Sequence[Tensor], sparsity: float) -> float:
    """`price_for` of the sites' entries with these costs."""
    logs = [(c / site.outputs).clamp(min=_TINY).log() for site, c in zip(sites, costs, strict=True)]
    return math.exp(level_below(logs, [site.outputs for site in sites], sparsity, _HALVINGS))


def _some(site: StreamInputs, rows: int) -> Tensor:
    """The places of so many rows, drawn once: at equal distances they may all be the same place of a window."""
    return torch.randperm(len(site.rows), generator=torch.Generator().manual_seed(0))[:rows].to(site.rows.device)
