# SPDX-License-Identifier: Apache-2.0
"""What may be trained beside alpha, for studies: an input-dependent part of low rank, gains, centres.

None of it is part of the adapter format but the centres. Of one linear, with what the mask keeps,

    y = g * (W (s * (S(x) - c) + c + alpha + A (B x)) + b),

where `A` and `B` have rank r (the paper's open question: several spontaneous neurons that the input plays on), `s` and
`g` are gains of kept entries and of outputs, and the centre `c` is what an entry is worth where it is dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spon_plugin.decoder.attachment import SparseMethod
from spon_plugin.decoder.sites import Site
from spon_plugin.errors import SponError
from spon_plugin.kernels.masked_input import reference
from spon_plugin.sparsifiers.thresholds import ThresholdFitted
from spon_plugin.training.recipe import Recipe
from spon_plugin.weights import linear_features


@dataclass(frozen=True)
class Extension:
    """What is trained beside alpha.

    Attributes:
        rank: of the input-dependent part of every linear; 0 for none.
        rank_rate: its rate, in units of alpha's.
        gain_rate: Adam's rate of the gains, which begin at 1; 0 for no gains.
        centers: whether the method's centres are trained, at alpha's rate; one for all linears of a site.
    """

    rank: int = 0
    rank_rate: float = 1.0
    gain_rate: float = 0.0
    centers: bool = False

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.rank or self.gain_rate or self.centers)

    def as_dict(self) -> dict[str, Any]:
        """For a row's file; `rank_rate` where it is not 1."""
        return {name: value for name, value in asdict(self).items() if name != "rank_rate" or value != 1.0}

    def extra_reads(self, sites: list[Site]) -> int:
        """Numbers of the weight's dtype that a token reads beside the weights: ``rank * (in + out)`` of each linear."""
        outputs = sum(count // site.in_features for site in sites for count in site.module_weights)
        inputs = sum(site.in_features * len(site.modules) for site in sites)
        return self.rank * (inputs + outputs)


class Extended(SparseMethod):
    """A method with thresholds, and an `Extension` around it.

    Args:
        base: the method; no position of its is dense.
        model: the dense model.
        sites: of the model.
        extension: what there is.
        seed: of the first values of `B`; `A` begins at zero.

    Raises:
        SponError: `base` leaves positions dense, or has no centres to train.
    """

    def __init__(
        self, base: ThresholdFitted, model: nn.Module, sites: list[Site], extension: Extension, seed: int = 0
    ) -> None:
        if base.dense_prefix:
            raise SponError.of("dense_prefix", base.dense_prefix, "0, beside what is trained beside alpha")
        if extension.centers and not base.centers:
            raise SponError.of("centers", "trained", f"a method that has some, unlike {base.name}", "Use sensitivity.")
        self.base, self.extension = base, extension
        self.name, self.modules, self.weights = base.name, base.modules, base.weights
        self.dense_prefix, self.static = 0, False
        self.site_of = {path: path for path in base.modules}
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        self._extra = extension.extra_reads(sites)
        self.down: dict[str, Tensor] = {}
        self.up: dict[str, Tensor] = {}
        self.input_gain: dict[str, Tensor] = {}
        self.output_gain: dict[str, Tensor] = {}
        self._trained_centers: dict[str, Tensor] = {}
        self._spread: dict[str, float] = {}
        for site in sites:
            for path in site.modules:
                inputs, outputs = linear_features(model.get_submodule(path), path)
                if extension.rank:  # B x is about 1: inputs are half as large again as their median
                    self._spread[path] = 1 / (inputs**0.5 * 1.5 * max(base.quantiles[path], 1e-6))
                    drawn = torch.randn(extension.rank, inputs, generator=generator) * self._spread[path]
                    self.down[path] = drawn.to(device).requires_grad_()
                    self.up[path] = torch.zeros(inputs, extension.rank, device=device, requires_grad=True)
                if extension.gain_rate:
                    self.input_gain[path] = torch.ones(inputs, device=device, requires_grad=True)
                    self.output_gain[path] = torch.ones(outputs, device=device, requires_grad=True)
            if extension.centers:
                shared = base.centers[site.modules[0]].detach().clone().to(device).requires_grad_()
                self._trained_centers |= dict.fromkeys(site.modules, shared)

    @property
    def centers(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        """See `SparseMethod.centers`."""
        return self._trained_centers or self.base.centers

    @property
    def extra_reads(self) -> int:
        """See `SparseMethod.extra_reads`."""
        return self._extra

    def parameters(self, recipe: Recipe) -> list[tuple[Tensor, float]]:
        """See `training.loop.Trainable`."""
        found: dict[int, tuple[Tensor, float]] = {}
        for path in self.modules:
            rate = recipe.rate(self.base.scales[path])
            if self.extension.rank:
                factor = self.extension.rank_rate
                found[id(self.up[path])] = self.up[path], factor * rate / self.extension.rank**0.5
                found[id(self.down[path])] = self.down[path], factor * 0.01 * self._spread[path]
            for gain in (self.input_gain.get(path), self.output_gain.get(path)):
                if gain is not None:
                    found[id(gain)] = gain, self.extension.gain_rate
            if path in self._trained_centers:
                center = self._trained_centers[path]
                found[id(center)] = center, min(rate, found.get(id(center), (center, rate))[1])
        return list(found.values())

    def with_factor(self, logarithm: float) -> Extended:
        """The same with thresholds that are ``exp(logarithm)`` times as high, sharing its parameters."""
        other = copy.copy(self)
        other.base = self.base.with_factor(logarithm)
        return other

    def fitted(self) -> ThresholdFitted | None:
        """The method alone, with the trained centres; None where an adapter cannot hold what there is besides."""
        if self.extension.rank or self.extension.gain_rate:
            return None
        centers = {path: center.detach().cpu() for path, center in self.centers.items()}
        return self.base.with_masks({path: replace(m, center=centers.get(path)) for path, m in self.base.masks.items()})

    def sparse_input(self, site: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `SparseMethod.sparse_input`."""
        mask = self.base.mask_on(x.device, self.base.site_of[site])
        center = self._trained_centers.get(site)
        kept, keep = mask.sparse_deviation(x) if center is None else reference(x, mask.threshold, center)
        if site in self.input_gain:
            kept = (kept * self.input_gain[site]).to(x.dtype)  # in float32 where the model is not
        if site in self.down:
            kept = kept + F.linear(F.linear(x, self.down[site].to(x.dtype)), self.up[site].to(x.dtype))
        return kept, keep

    def hooks(self, model: nn.Module) -> list[Any]:
        """See `SparseMethod.hooks`: gains of outputs."""
        return [
            model.get_submodule(path).register_forward_hook(lambda _module, _args, y, gain=gain: (y * gain).to(y.dtype))
            for path, gain in self.output_gain.items()
        ]
