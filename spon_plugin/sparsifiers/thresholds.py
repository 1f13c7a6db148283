# SPDX-License-Identifier: Apache-2.0
"""Methods that mask by `masking.keep_mask`: thresholds per site, scalar or per channel, with or without a centre."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.adapter.config import SponFields
from spon_plugin.adapter.mask import Mask, with_alphas
from spon_plugin.calibration.sensitivity import scaled
from spon_plugin.calibration.text import windows_digest
from spon_plugin.decoder.sites import Site
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Fitted, Sparsifier, Statistics, readable_weight


class ThresholdFitted(Fitted):
    """``W S(x) + b`` with `S` of `spon_plugin.masking`; fits the adapter format.

    Attributes:
        site_masks: site name -> threshold and centre.
        allocation: how the target was spread over the sites.
        matched: whether the thresholds were brought to the target in the sparse model.
    """

    def __init__(
        self,
        name: str,
        statistics: Statistics,
        sparsity: float,
        masks: Mapping[str, Mask],
        allocation: str = "uniform",
        matched: bool = False,
    ) -> None:
        super().__init__(name, statistics, sparsity)
        self.site_masks = dict(masks)
        centers = {path: self.site_masks[site.name].center for path, site in self.site_of.items()}
        self.centers = {path: center for path, center in centers.items() if center is not None}
        self.allocation, self.matched = allocation, matched
        self._placed: dict[tuple[str, torch.device], Mask] = {}
        self.scales = {path: self.alpha_scale(path, mask) for path, mask in self.masks.items()}
        self._tokens = {"tokens": int(statistics.windows.numel()), "window": int(statistics.windows.shape[1])}
        self._tokens_sha256 = windows_digest(statistics.windows)

    @property
    def masks(self) -> dict[str, Mask]:
        """Module path -> threshold and centre; the linears of a site share theirs."""
        return {path: self.site_masks[site.name] for path, site in self.site_of.items()}

    def with_masks(self, masks: Mapping[str, Mask]) -> ThresholdFitted:
        """The same with thresholds that were brought to the target in the sparse model.

        Args:
            masks: module path -> mask, one for the linears of each site; alphas are left out.
        """
        other = copy.copy(self)
        other.site_masks = {site.name: masks[path].without_alpha() for path, site in self.site_of.items()}
        centers = {path: other.site_masks[site.name].center for path, site in self.site_of.items()}
        other.centers = {path: center for path, center in centers.items() if center is not None}
        other.matched, other._placed = True, {}
        return other

    def with_factor(self, logarithm: float) -> ThresholdFitted:
        """The same with thresholds that are ``exp(logarithm)`` times as high."""
        return self.with_masks(scaled(self.masks, logarithm))

    def alpha_scale(self, path: str, mask: Mask) -> float:
        """The unit of alpha's learning rate for the linear at `path` under `mask`; see `Fitted.scales`.

        Alphas stand in for what is dropped, so the unit is the threshold. Where there is one per channel they say
        little (WINA's is the largest number there is for a channel without weights), and it is the quantile.
        """
        return self.quantiles[path] if mask.per_channel else float(mask.threshold)

    def sparse_input(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `SparseMethod.sparse_input`."""
        return self.mask_on(x.device, site).sparse_deviation(x)

    def mask_on(self, device: torch.device, site: Site) -> Mask:
        """The mask of a site on a device, moved there once."""
        if (site.name, device) not in self._placed:
            self._placed[site.name, device] = self.site_masks[site.name].to(device)
        return self._placed[site.name, device]

    @property
    def mask_bytes(self) -> int:
        """Of the thresholds, one or a vector per site, and of centres that differ between channels."""
        masks = self.site_masks.values()
        vectors = [c for c in (mask.center for mask in masks) if c is not None and bool((c != c[0]).any())]
        return 4 * sum(tensor.numel() for tensor in (*(mask.threshold for mask in masks), *vectors))

    def adapter(
        self,
        alphas: Mapping[str, Tensor] | None = None,
        fields: SponFields | None = None,
        peft: Mapping[str, Any] | None = None,
    ) -> Adapter:
        """See `Fitted.adapter`."""
        alphas = {path: alpha.detach().float().cpu() for path, alpha in (alphas or {}).items()}
        if fields is None:
            modules = "all" if set(alphas) == set(self.modules) else sorted(alphas)
            fields = SponFields(alpha_modules=modules, dense_prefix=self.dense_prefix)
        fields = replace(
            fields,
            sparsity=self.sparsity,
            allocation=self.allocation,
            alpha_scale={path: self.scales[path] for path in self.modules if path in alphas},
            calibration={
                **fields.calibration,
                "method": self.name,
                **self._tokens,
                "tokens_sha256": self._tokens_sha256,
                "matched": self.matched,
            },
        )
        adapter = Adapter(fields, with_alphas(self.masks, alphas), dict(peft or {}))
        adapter.check()
        return adapter


class ThresholdSparsifier(Sparsifier):
    """A method whose masks an adapter can hold, so that every command and host has it."""

    @abstractmethod
    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> ThresholdFitted:
        """See `Sparsifier.at`."""


def column_norms(model: nn.Module, site: Site) -> Tensor:
    """``||W_:,i||`` over the weights of a site's linears, stacked along their outputs: float32 ``[in_features]``."""
    total: Any = 0.0
    for path in site.modules:
        total = total + readable_weight(model, path).float().square().sum(0)
    return torch.sqrt(total).cpu()
