# SPDX-License-Identifier: Apache-2.0
"""SATS (arXiv 2607.08991): CATS's masks, with thresholds by how much the MLP's output feels them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spon_plugin.calibration.histogram import BINS, MagnitudeHistogram
from spon_plugin.calibration.sensitivity import MATCH_TOKENS
from spon_plugin.calibration.streaming import Observe, counted_rows, window_batches
from spon_plugin.decoder.positions import whole_windows
from spon_plugin.decoder.sites import Site, module_weights
from spon_plugin.decoder.sparsity import SparsityCounter
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Sparsifier, Statistics
from spon_plugin.sparsifiers.cats import MOST_NEURONS, CatsFitted, GatedMLP, gated_mlps, neurons, share_of
from spon_plugin.sparsifiers.thresholds import column_norms

TOLERANCE = 0.002
_PASSES = 6
_BISECTIONS = 50
_LEAST_BUDGET = 1e-12


class DistortionCurve:
    """What each threshold on the gates of one MLP does to its output; size independent of the number of tokens.

    Args:
        norms: float32 ``[neurons]``, ``||W_:,i||`` of the columns of `down`.

    Attributes:
        mlp: where it is; set before anything is seen.
        gates: magnitudes of ``act(gate(x))``.
        energy: float64 ``[BINS]``, the squared parts that the neurons in a bin of `gates` have in the output.
    """

    mlp: GatedMLP

    def __init__(self, norms: Tensor) -> None:
        self.norms = norms
        self.gates = MagnitudeHistogram()
        self.energy = torch.zeros(BINS, dtype=torch.float64)
        self._gated: Tensor | None = None

    def see_gate(self, y: Tensor, special: Tensor | None) -> None:
        """See outputs of `gate`, whose products with those of `up` come to `update` next."""
        self._gated = self.mlp.activation(counted_rows(y, special)).float()

    def update(self, rows: Tensor) -> None:
        """See inputs of `down`, ``[tokens, neurons]``."""
        gated, self._gated = self._gated, None
        assert gated is not None, "down runs after gate"
        self.gates.update(gated)
        parts = (rows.float() * self.norms.to(rows.device)).square().double().flatten()
        self.energy += torch.bincount(_bins(gated), parts, minlength=BINS).cpu()

    def share_within(self, budget: float) -> float:
        """The share of the gates below the largest threshold whose distortion is within a budget.

        Args:
            budget: share of the output's energy, in [0, 1).
        """
        running = self.energy.cumsum(0) / self.energy.sum()
        counts = self.gates.counts.cumsum(0)
        above = int(torch.searchsorted(running, torch.tensor(budget, dtype=torch.float64), right=True))
        above = min(above, BINS - 1)  # the first bin that a whole budget does not hold
        spent, below = (float(running[above - 1]), int(counts[above - 1])) if above else (0.0, 0)
        cost = float(running[above]) - spent
        part = (budget - spent) / cost if cost > 0 else 0.0  # linear inside a bin, as quantiles are
        return min(MOST_NEURONS, (below + part * int(self.gates.counts[above])) / self.gates.total)


def _bins(x: Tensor) -> Tensor:
    """The bin of each magnitude in a `MagnitudeHistogram`."""
    return x.abs().contiguous().view(torch.int32).flatten() >> 16


def shares_at(curves: Sequence[DistortionCurve], weights: Sequence[int], share: float) -> list[float]:
    """Every MLP's share of dropped neurons under the one budget at which they drop `share` of their weights together.

    Args:
        curves: of the MLPs.
        weights: of the linears that each spares.
        share: the target, in [0, `MOST_NEURONS`].
    """
    low, high = math.log(_LEAST_BUDGET), 0.0
    shares = [0.0 for _ in curves]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        shares = [curve.share_within(math.exp(middle)) for curve in curves]
        met = sum(part * count for part, count in zip(shares, weights, strict=True)) / sum(weights)
        low, high = (middle, high) if met < share else (low, middle)
    return shares if share > 0 else [0.0 for _ in curves]


class Sats(Sparsifier):
    """``down(m * act(gate(x)) * up(x))`` with ``m_i = |act(gate(x))_i| > tau_l``; evaluation only.

    From the paper, as its abstract and published summaries give it (the text itself was out of reach): the masks are
    CATS's, and `tau_l` is the largest threshold at which the local distortion of MLP `l`'s output stays within a budget
    that is the same for all layers; an outer loop searches the budget that meets the target, at the sparsity that the
    sparse model actually has.

    Our reading, where no formula was to be had: the distortion is the share of the output's energy that is dropped,
    ``sum_{t,i: |a_ti| <= tau} (a_ti u_ti ||W_:,i||)^2 / sum_{t,i} (a_ti u_ti ||W_:,i||)^2`` with ``a = act(gate(x))``,
    ``u = up(x)`` and `W` the weight of `down`, over tokens `t`: the squared error of the output if the parts of its
    neurons are uncorrelated. Attention stays dense, as in CATS. The paper's token routing, which runs some tokens
    dense, is another method and not part of this one.
    """

    name, title, universal = "sats", "SATS", False

    def observer(self, model: nn.Module, site: Site, statistics: Statistics) -> DistortionCurve | None:
        """See `Sparsifier.observer`."""
        return DistortionCurve(column_norms(model, site)) if site.role == "mlp_out" else None

    def output_observers(self, model: nn.Module, statistics: Statistics) -> dict[str, Observe]:
        """See `Sparsifier.output_observers`."""
        observers: dict[str, Observe] = {}
        for mlp in gated_mlps(model, statistics.sites, self.name):
            curve: DistortionCurve = statistics.own[mlp.down_site]
            curve.mlp = mlp
            observers[mlp.gate] = curve.see_gate
        return observers

    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> CatsFitted:
        """See `Sparsifier.at`: the sparse model runs a few times over `MATCH_TOKENS` tokens."""
        curves: list[DistortionCurve] = list(statistics.own.values())
        mlps = [curve.mlp for curve in curves]
        share = share_of(self.name, statistics.sites, neurons(mlps), sparsity, "attention and gates")
        reachable = sparsity / share if share else 1.0
        fitted = self._fitted(statistics, curves, share, sparsity)
        for done in range(1, _PASSES):
            achieved = _achieved(model, fitted, statistics.windows)
            progress(done, _PASSES)
            if abs(achieved - sparsity) <= TOLERANCE:
                break
            share = min(max(share + (sparsity - achieved) / reachable, 0.0), MOST_NEURONS)
            fitted = self._fitted(statistics, curves, share, sparsity)
        return fitted

    def _fitted(
        self, statistics: Statistics, curves: Sequence[DistortionCurve], share: float, sparsity: float
    ) -> CatsFitted:
        mlps = [curve.mlp for curve in curves]
        weights = module_weights(statistics.sites)
        spared = [weights[mlp.up] + weights[mlp.down] for mlp in mlps]
        parts = zip(mlps, curves, shares_at(curves, spared, share), strict=True)
        thresholds = {mlp.gate: torch.tensor([curve.gates.quantile(part)]) for mlp, curve, part in parts}
        return CatsFitted(self.name, statistics, sparsity, mlps, thresholds)


@torch.no_grad()
def _achieved(model: nn.Module, fitted: CatsFitted, windows: Tensor) -> float:
    """The share of the model's weights that go unused in the sparse model itself."""
    windows = windows[: max(1, MATCH_TOKENS // windows.shape[1])]
    counter, device = SparsityCounter(), next(model.parameters()).device
    with fitted.attach(model, counter=counter), whole_windows():
        for _, batch in window_batches(windows, 4):
            model(input_ids=batch.to(device))
    return fitted.masked_share(counter)
