# SPDX-License-Identifier: Apache-2.0
"""Calibration: from a dense model and some text to an adapter with thresholds (alpha zero: plain TEAL)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.adapter.base import base_digest
from spon_plugin.adapter.config import SponFields, carries_alpha
from spon_plugin.adapter.mask import Mask, with_alphas
from spon_plugin.calibration.measurement import mean_alphas, measure_sparsity
from spon_plugin.calibration.sensitivity import match_sparsity
from spon_plugin.calibration.text import windows_digest
from spon_plugin.decoder.sites import Site, find_sites, module_weights, target_names
from spon_plugin.errors import SponError
from spon_plugin.masking import check_sparsity
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.registry import adapter_sparsifier

METHODS = {"uniform": "teal", "greedy": "teal-greedy", "sensitivity": "sensitivity"}
"""The method of an allocation, as an adapter's config names it."""


def calibrate(
    model: nn.Module,
    sites: Sequence[Site],
    windows: Tensor,
    held_out: Tensor,
    sparsity: float,
    method: str = "teal",
    alpha: Literal["none", "zero", "mean"] = "none",
    alpha_modules: str | list[str] = "all",
    dense_prefix: int | None = None,
    source: dict[str, Any] | None = None,
    base_model: str | None = None,
    match: bool = False,
    stage: Callable[[str], Progress] = lambda _name: no_progress,
) -> Adapter:
    """Find the masks of an adapter by any method that fits the format, and measure the sparsity they achieve.

    Args:
        model: a dense decoder.
        sites: what to sparsify, from `find_sites`.
        windows: token ids ``[count, length]`` to calibrate on.
        held_out: token ids ``[count, length]`` that were not calibrated on, for the achieved sparsity.
        sparsity: the target, in [0, 1).
        method: a name of `adapter_methods`, or of a method that another package brings.
        alpha: ``none`` (masks alone), ``zero`` (alphas to be trained) or ``mean`` (the control without training).
        alpha_modules: which linears carry an alpha; ignored for ``none``.
        dense_prefix: first positions of a sequence that stay dense; the format's default if None.
        source: where the text came from, kept in the adapter's `calibration` field.
        base_model: kept as `base_model_name_or_path`.
        match: hold the target in the sparse model itself, which quantiles of the dense model's inputs miss by a point
            or two, see `match_sparsity`; ``sensitivity`` always does.
        stage: gives the progress callback of each stage by its name.

    Raises:
        SponError: a value is wrong, the method does not fit the format, or `alpha_modules` names no sparsified linear.
    """
    check_sparsity(sparsity)
    sparsifier = adapter_sparsifier(method)
    modules = list(module_weights(sites))
    if alpha == "none":
        alpha_modules = []
    elif not any(carries_alpha(module, alpha_modules) for module in modules):
        names = ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
        raise SponError.of("alpha_modules", alpha_modules, f'"all" or names of sparsified linears: {names}')
    fields = SponFields(sparsity=float(sparsity), alpha_modules=alpha_modules)
    if dense_prefix is not None:
        fields.dense_prefix = dense_prefix
    fields.check()
    fields.base_digest = base_digest(model)
    prefix = fields.dense_prefix
    statistics = sparsifier.calibrate(model, sites, windows, prefix, stage("Calibrating"))
    fitted = sparsifier.at(model, statistics, sparsity, stage("Fitting"))
    masks, matched = fitted.masks, match or fitted.matched
    if matched and not fitted.matched:
        masks = match_sparsity(model, sites, masks, windows, sparsity, prefix)
    carriers = [module for module in modules if carries_alpha(module, alpha_modules)]
    if carriers:
        means = mean_alphas(model, sites, masks, windows, statistics.skip) if alpha == "mean" else {}
        inputs = {path: site.in_features for site in sites for path in site.modules}
        masks = with_alphas(masks, {path: means.get(path, torch.zeros(inputs[path])) for path in carriers})
    fields.allocation = fitted.allocation
    fields.alpha_scale = {path: fitted.alpha_scale(path, masks[path]) for path in carriers}
    fields.calibration = {
        **(source or {}),
        "method": method,
        "tokens": int(windows.numel()),
        "window": int(windows.shape[1]),
        "tokens_sha256": windows_digest(windows),
        "matched": matched,
        **_achieved(model, sites, held_out, masks, prefix),
    }
    return Adapter(fields, masks, peft_fields(model, sites, base_model))


def peft_fields(model: nn.Module, sites: Sequence[Site], base_model: str | None) -> dict[str, Any]:
    """PEFT's part of an adapter's config.

    Args:
        model: the dense model.
        sites: what the adapter masks.
        base_model: as in `calibrate`.
    """
    return {
        "base_model_name_or_path": base_model,
        "target_modules": target_names(sites, model),
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }


def method_of(fields: SponFields) -> str:
    """The method that made an adapter's masks; adapters that do not say it have that of their allocation."""
    return str(fields.calibration.get("method", METHODS[fields.allocation]))


def settle(model: nn.Module, adapter: Adapter, windows: Tensor, held_out: Tensor) -> Adapter:
    """An adapter after its alphas were trained: they lift activations above the thresholds, so it achieves less.

    The sparsity is measured anew. Thresholds that were matched to the target in the sparse model are brought back to
    it, all by one factor.

    Args:
        model: the dense model.
        adapter: with its trained alphas.
        windows: token ids ``[count, length]``, such as those trained on; see `match_sparsity`.
        held_out: others, to measure on.

    Raises:
        SponError: the adapter's linears are not in the model.
    """
    sites, prefix = find_sites(model, sorted(adapter.masks)), adapter.fields.dense_prefix
    masks = adapter.masks
    if adapter.fields.calibration.get("matched"):
        masks = match_sparsity(model, sites, masks, windows, adapter.fields.sparsity, prefix)
    measured = _achieved(model, sites, held_out, masks, prefix)
    fields = replace(adapter.fields, calibration={**adapter.fields.calibration, **measured})
    return replace(adapter, fields=fields, masks=masks)


def _achieved(
    model: nn.Module,
    sites: Sequence[Site],
    held_out: Tensor,
    masks: Mapping[str, Mask],
    dense_prefix: int,
) -> dict[str, Any]:
    """What the `calibration` field says of the achieved sparsity: of the model, and of each site."""
    achieved, per_module = measure_sparsity(model, sites, masks, held_out, dense_prefix)
    return {
        "held_out_tokens": int(held_out.numel()),
        "achieved_sparsity": round(achieved, 4),
        "sites": {
            site.name: {
                "modules": [path.removeprefix(site.block + ".") for path in site.modules],
                "weights": site.weights,
                "achieved_sparsity": round(_of_site(site, per_module), 4),
            }
            for site in sites
        },
    }


def _of_site(site: Site, per_module: dict[str, float]) -> float:
    """A site's share: its linears have one mask, or each its own, and count by their weights."""
    pairs = zip(site.modules, site.module_weights, strict=True)
    return sum(per_module[path] * count for path, count in pairs) / site.weights
