# SPDX-License-Identifier: Apache-2.0
"""Methods that mask by `masking.keep_mask`: thresholds per site, scalar or per channel, with or without a centre."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.adapter.config import SponFields
from spon_plugin.adapter.directory import Adapter
from spon_plugin.calibration.text import windows_digest
from spon_plugin.decoder.sites import Site
from spon_plugin.masking import deviation, keep_mask, zero_dropped
from spon_plugin.sparsifiers.base import Fitted, Statistics, readable_weight


class ThresholdFitted(Fitted):
    """``W S(x) + b`` with `S` of `spon_plugin.masking`; fits the adapter format.

    Attributes:
        thresholds: site name -> float32 ``[1]`` or ``[in_features]``.
        site_centers: site name -> float32 ``[in_features]``; empty where the centre is 0.
        allocation: how the target was spread over the sites.
        matched: whether the thresholds were brought to the target in the sparse model.
    """

    def __init__(
        self,
        name: str,
        statistics: Statistics,
        sparsity: float,
        thresholds: Mapping[str, Tensor],
        centers: Mapping[str, Tensor] | None = None,
        allocation: str = "uniform",
        matched: bool = False,
    ) -> None:
        super().__init__(name, statistics, sparsity)
        self.thresholds = dict(thresholds)
        self.site_centers = dict(centers or {})
        self.centers = {
            path: self.site_centers[site.name] for path, site in self.site_of.items() if site.name in self.site_centers
        }
        self.allocation, self.matched = allocation, matched
        self._tokens = {"tokens": int(statistics.windows.numel()), "window": int(statistics.windows.shape[1])}
        self._tokens_sha256 = windows_digest(statistics.windows)

    def sparse_input(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Fitted.sparse_input`."""
        threshold, center = self.thresholds[site.name].to(x.device), self.site_centers.get(site.name)
        x = deviation(x, None if center is None else center.to(x.device))
        keep = keep_mask(x, threshold)
        return zero_dropped(x, keep), keep

    @property
    def mask_bytes(self) -> int:
        """Of the thresholds, one or a vector per site, and of centres that differ between channels."""
        vectors = [center for center in self.site_centers.values() if bool((center != center[0]).any())]
        return 4 * sum(tensor.numel() for tensor in (*self.thresholds.values(), *vectors))

    def adapter(
        self,
        alphas: Mapping[str, Tensor] | None = None,
        fields: SponFields | None = None,
        peft: Mapping[str, Any] | None = None,
    ) -> Adapter:
        """See `Fitted.adapter`."""
        alphas = dict(alphas or {})
        if fields is None:
            modules = "all" if set(alphas) == set(self.modules) else sorted(alphas)
            fields = SponFields(alpha_modules=modules, dense_prefix=self.dense_prefix)
        fields = replace(
            fields,
            sparsity=self.sparsity,
            allocation=self.allocation,
            calibration={
                **fields.calibration,
                "method": self.name,
                **self._tokens,
                "tokens_sha256": self._tokens_sha256,
                "matched": self.matched,
            },
        )
        thresholds = {path: self.thresholds[site.name].clone() for path, site in self.site_of.items()}
        centers = {path: center.clone() for path, center in self.centers.items()}
        adapter = Adapter(fields, thresholds, {path: a.detach().float().cpu() for path, a in alphas.items()})
        adapter.centers, adapter.peft = centers, dict(peft or {})
        adapter.check()
        return adapter


def column_norms(model: nn.Module, site: Site) -> Tensor:
    """``||W_:,i||`` over the weights of a site's linears, stacked along their outputs: float32 ``[in_features]``."""
    total: Any = 0.0
    for path in site.modules:
        total = total + readable_weight(model, path).float().square().sum(0)
    return torch.sqrt(total).cpu()
