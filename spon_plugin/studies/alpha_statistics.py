# SPDX-License-Identifier: Apache-2.0
"""What alphas became: how large they are beside thresholds and outputs, and how much of them is the mean error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.calibration.streaming import SINKS, Observe, counted_rows, stream_inputs
from spon_plugin.decoder.sites import Site
from spon_plugin.masking import sparsify
from spon_plugin.progress import Progress, no_progress
from spon_plugin.studies.hidden_shift import check_prompts
from spon_plugin.weights.fold import fold_alpha


@dataclass(frozen=True)
class AlphaStatistics:
    """One linear's alpha, over the inputs that it has in the dense model.

    Attributes:
        module: path of the linear.
        site: name of its site.
        role: ``attn_in``, ``attn_out``, ``mlp_in`` or ``mlp_out``.
        norm: ``||alpha||``.
        rms_to_threshold: root mean square of alpha over that of the threshold: alpha stands in for entries below it, so
            1 is as large as anything that was dropped. None for a threshold of 0.
        largest_to_threshold: the same of alpha's largest magnitude.
        bias_norm: ``||W alpha||``.
        energy: ``||W alpha||^2 / E||W x + b||^2``: the bias's share of the output's energy.
        mean_error_cosine: cosine of alpha and ``E[x - S(x)]``, the bias without training. None where either is 0.
    """

    module: str
    site: str
    role: str
    norm: float
    rms_to_threshold: float | None
    largest_to_threshold: float | None
    bias_norm: float
    energy: float
    mean_error_cosine: float | None


@torch.no_grad()
def alpha_statistics(
    model: nn.Module,
    adapter: Adapter,
    sites: Sequence[Site],
    prompts: Sequence[Tensor],
    progress: Progress = no_progress,
) -> list[AlphaStatistics]:
    """Measure every alpha of an adapter on some text.

    Args:
        model: the dense base model.
        adapter: with alphas, checked against the model.
        sites: from `find_sites`.
        prompts: token ids ``[length]`` each, longer than what is left out: `SINKS` and the adapter's dense prefix.
        progress: called after each prompt.

    Returns:
        One per linear that carries an alpha, in the order of the model.

    Raises:
        SponError: there are no prompts, or one is too short.
    """
    skip = max(SINKS, adapter.fields.dense_prefix)
    check_prompts(prompts, skip)
    alphas = {path: mask.alpha for path, mask in adapter.masks.items() if mask.alpha is not None}
    site_of = {path: site for site in sites for path in site.modules if path in alphas}
    dropped: dict[str, Tensor] = {}
    energy: dict[str, Tensor] = {}
    count = sum(len(prompt) - skip for prompt in prompts)

    def on_input(path: str) -> Observe:
        def observe(x: Tensor, special: Tensor | None) -> None:
            rows = counted_rows(x, special)
            mask = adapter.masks[path].to(x.device)
            missing = rows - sparsify(rows, mask.threshold, None, mask.center)
            _add(dropped, path, missing.float().sum(0))

        return observe

    def on_output(path: str) -> Observe:
        return lambda y, special: _add(energy, path, counted_rows(y, special).float().square().sum())

    inputs, outputs = {p: on_input(p) for p in site_of}, {p: on_output(p) for p in site_of}
    for done, prompt in enumerate(prompts, start=1):
        stream_inputs(model, inputs, prompt[None], skip, outputs=outputs)
        progress(done, len(prompts))
    rows = []
    for path, site in site_of.items():
        alpha, threshold = alphas[path], adapter.masks[path].threshold
        scale = float(threshold.square().mean().sqrt())
        bias = fold_alpha(model.get_submodule(path), alpha, path)
        rows.append(
            AlphaStatistics(
                path,
                site.name,
                site.role,
                float(alpha.norm()),
                float(alpha.square().mean().sqrt()) / scale if scale else None,
                float(alpha.abs().max()) / scale if scale else None,
                float(bias.norm()),
                float(bias.square().sum() / (energy[path] / count)),
                _cosine(alpha, dropped[path].cpu()),
            )
        )
    return rows


def _add(sums: dict[str, Tensor], path: str, part: Tensor) -> None:
    sums[path] = sums[path] + part if path in sums else part


def _cosine(a: Tensor, b: Tensor) -> float | None:
    return float(F.cosine_similarity(a, b, dim=0)) if a.any() and b.any() else None
