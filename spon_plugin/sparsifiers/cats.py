# SPDX-License-Identifier: Apache-2.0
"""CATS (arXiv 2404.08763, github.com/ScalingIntelligence/CATS): the gate decides which neurons of the MLP run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.calibration.histogram import MagnitudeHistogram
from spon_plugin.calibration.streaming import Observe, counted_rows
from spon_plugin.decoder.sites import Site, module_weights
from spon_plugin.decoder.sparsity import SparsityCounter
from spon_plugin.errors import SponError
from spon_plugin.masking import keep_mask, zero_dropped
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Fitted, Sparsifier, Statistics
from spon_plugin.weights.linears import linear_features

_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")
MOST_NEURONS = 0.99


@dataclass(frozen=True)
class GatedMLP:
    """The parts of ``down(activation(gate(x)) * up(x))``, by module path, with the site that `down` reads."""

    gate: str
    up: str
    down: str
    down_site: str
    activation: Callable[[Tensor], Tensor]


def gated_mlps(model: nn.Module, sites: Sequence[Site], method: str) -> list[GatedMLP]:
    """Find the gated MLPs of a decoder, and prove each on random input.

    Args:
        model: the dense decoder.
        sites: of `find_sites`.
        method: who asks, for the error.

    Raises:
        SponError: a block's MLP is not ``down(activation(gate(x)) * up(x))`` of separate linears.
    """
    found = [_gated_mlp(model, site, sites, method) for site in sites if site.role == "mlp_out"]
    if not found:
        raise SponError.of("method", method, "a method for this model: its blocks have no gated MLP")
    return found


def _gated_mlp(model: nn.Module, down_site: Site, sites: Sequence[Site], method: str) -> GatedMLP:
    down = down_site.modules[-1]
    parent = model.get_submodule(down.rpartition(".")[0])
    activation: Any = next((getattr(parent, name) for name in _ACTIVATIONS if hasattr(parent, name)), None)
    pair = [site.modules for site in sites if site.block == down_site.block and site.role == "mlp_in"]
    if activation is not None and len(pair) == 1 and len(pair[0]) == 2:
        for gate, up in (pair[0], pair[0][::-1]):
            if _is_gated(model, parent, gate, up, down, activation):
                return GatedMLP(gate, up, down, down_site.name, activation)
    raise SponError.of(
        "method", method, f"a method for this model: the MLP of {down_site.block} is not down(act(gate(x)) * up(x))"
    )


@torch.no_grad()
def _is_gated(model: nn.Module, parent: nn.Module, gate: str, up: str, down: str, activation: Any) -> bool:
    first, second, last = (model.get_submodule(path) for path in (gate, up, down))
    weight: Any = first.weight
    x = torch.randn(1, 2, linear_features(first)[0], generator=torch.Generator().manual_seed(0)).to(weight)
    made, own = last(activation(first(x)) * second(x)), parent(x)
    return isinstance(own, Tensor) and torch.allclose(made.float(), own.float(), rtol=2e-2, atol=1e-3)


class CatsFitted(Fitted):
    """See `Cats`.

    Attributes:
        mlps: the gated MLPs.
        thresholds: path of the gate -> float32 ``[1]``, or ``[neurons]`` for one per channel.
    """

    def __init__(
        self,
        name: str,
        statistics: Statistics,
        sparsity: float,
        mlps: list[GatedMLP],
        thresholds: dict[str, Tensor],
    ) -> None:
        super().__init__(name, statistics, sparsity)
        self.mlps, self.thresholds = mlps, thresholds
        self.modules = tuple(neurons(mlps))
        self._keep: dict[str, Tensor] = {}

    def sparse_input(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `SparseMethod.sparse_input`: what `down` reads is masked by the gate; what `up` reads is whole."""
        keep = self._keep.get(site.name)
        return (x, None) if keep is None else (zero_dropped(x, keep), keep)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """See `SparseMethod.watching`: the gates' outputs."""
        handles = [model.get_submodule(mlp.gate).register_forward_hook(self._decide(mlp)) for mlp in self.mlps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._keep.clear()

    def _decide(self, mlp: GatedMLP) -> Any:
        @torch.no_grad()
        def hook(_module: nn.Module, _args: tuple[Any, ...], y: Tensor) -> None:
            self._keep[mlp.down_site] = keep_mask(mlp.activation(y), self.thresholds[mlp.gate].to(y.device))

        return hook

    def drops(self, counter: SparsityCounter) -> dict[str, float]:
        """See `Fitted.drops`: a neuron that is off is a row of `up` and a column of `down`."""
        counted = counter.per_module()
        return {path: counted.get(mlp.down, 0.0) for mlp in self.mlps for path in neurons([mlp])}

    @property
    def mask_bytes(self) -> int:
        """Of the thresholds."""
        return 4 * sum(threshold.numel() for threshold in self.thresholds.values())


class Cats(Sparsifier):
    """``down(m * act(gate(x)) * up(x))`` with ``m_i = |act(gate(x))_i| > tau``; evaluation only.

    Attention and the gate stay dense, so the share of neurons that are off is the model-wide target divided by the
    share of the weights in `up` and `down` (half of them in SmolLM2-135M, 0.59 in Llama-2-7B): beyond that the target
    cannot be reached. tau is the quantile of ``|act(gate(x))|`` per layer.
    """

    name, title, universal = "cats", "CATS", False

    def output_observers(self, model: nn.Module, statistics: Statistics) -> dict[str, Observe]:
        """See `Sparsifier.output_observers`."""
        observers: dict[str, Observe] = {}
        for mlp in gated_mlps(model, statistics.sites, self.name):
            histogram = MagnitudeHistogram()
            statistics.own[mlp.gate] = (mlp, histogram)
            observers[mlp.gate] = _activated(mlp, histogram)
        return observers

    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> CatsFitted:
        """See `Sparsifier.at`."""
        mlps = [mlp for mlp, _ in statistics.own.values()]
        share = share_of(self.name, statistics.sites, neurons(mlps), sparsity, "attention and gates")
        thresholds = {
            gate: torch.tensor([histogram.quantile(share)]) for gate, (_, histogram) in statistics.own.items()
        }
        return CatsFitted(self.name, statistics, sparsity, mlps, thresholds)


def neurons(mlps: Iterable[GatedMLP]) -> list[str]:
    """The linears that a gate's mask spares: a neuron that is off is a row of `up` and a column of `down`."""
    return [path for mlp in mlps for path in (mlp.up, mlp.down)]


def share_of(name: str, sites: Iterable[Site], covered: Iterable[str], sparsity: float, dense: str) -> float:
    """The share that the linears which a method covers must drop for the model to have the target.

    Args:
        name: of the method, for the error.
        sites: of the whole model.
        covered: paths of the linears.
        sparsity: the target.
        dense: in words, what the method leaves dense.

    Raises:
        SponError: the target is beyond reach.
    """
    weights = module_weights(sites)
    reachable = sum(weights[path] for path in covered) / sum(weights.values())
    if sparsity > MOST_NEURONS * reachable:
        expected = f"at most {MOST_NEURONS * reachable:.3f}, as {name} leaves {dense} dense"
        raise SponError.of("sparsity", sparsity, expected)
    return sparsity / reachable


def _activated(mlp: GatedMLP, histogram: MagnitudeHistogram) -> Observe:
    return lambda y, special: histogram.update(mlp.activation(counted_rows(y, special)))
