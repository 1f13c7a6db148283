# SPDX-License-Identifier: Apache-2.0
"""Thresholds and centres per channel from how much the model's output feels each channel of each site.

Setting entry `x_i` of a site's input to `c_i` moves the output by ``KL ~ f_i (x_i - c_i)^2 / 2``, where `f_i` is the
diagonal of the Fisher information: the mean squared gradient of ``log p(y)`` by `x_i`, `y` drawn from the model itself
(optimal brain damage, LeCun et al. 1989, on activations). It saves the `o` weights per entry that the site's linears
read. Dropping what costs least per weight, at a price `lambda` per weight that is the same in the whole model, means

    drop where f_i (x_i - c_i)^2 < lambda o,    so    threshold_i = sqrt(lambda o / f_i),

which spreads the target over layers, sites and channels at once. Given the thresholds, the best `c_i` is the mean of
the entries that are dropped, which depends on `c_i`: it is found by iteration (Lloyd), from zero and from the median.

The quadratic form holds for small errors, and half of a model's inputs is not small: taken literally it overdoes the
differences. So thresholds are the geometric mean (`BLEND`) of these and TEAL's uniform ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spon_plugin.errors import SponError
from spon_plugin.masking import check_sparsity
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sites import Site
from spon_plugin.statistics import measure_sparsity
from spon_plugin.streaming import counted_rows, stream_inputs, window_batches
from spon_plugin.tokens import DenseTokens

BLEND = 0.5
SAMPLE_ROWS = 4096
# A channel that the calibration text never moved is not free: its sensitivity counts as at least this share of the
# site's mean.
_FLOOR = 1e-3
_CENTER_STEPS = 8
_BISECTIONS = 24


@dataclass
class SiteSample:
    """What the thresholds of a site are made from.

    Attributes:
        rows: inputs ``[n, in_features]`` of the dense model, float32, on the CPU.
        fisher: float32 ``[in_features]``, the mean squared gradient of the log-likelihood by the input.
        outputs: how many weights an entry of the input meets: the `out_features` of the site's linears together.
    """

    rows: Tensor
    fisher: Tensor
    outputs: int


def collect_samples(
    model: nn.Module,
    sites: Sequence[Site],
    windows: Tensor,
    dense_prefix: int = 1,
    seed: int = 0,
    max_rows: int = SAMPLE_ROWS,
    progress: Progress = no_progress,
) -> dict[str, SiteSample]:
    """Run the dense model forward and backward over some text.

    Args:
        model: a dense decoder that maps ``input_ids=`` to an object with ``logits``.
        sites: from `find_sites`.
        windows: token ids, int64 ``[count, length]``, without padding.
        dense_prefix: first positions of each window that are not counted.
        seed: of the sampled tokens.
        max_rows: tokens whose inputs are kept, spread over the text.
        progress: called after each window.

    Returns:
        Site name -> sample.

    Raises:
        SponError: there are no windows, or none has a position after the prefix.
    """
    fisher = collect_fisher(model, sites, windows, dense_prefix, seed, progress)
    every = -(-windows[:, dense_prefix:].numel() // max_rows)
    rows: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def observe(kept: list[Tensor]) -> Any:
        return lambda x, special: kept.append(counted_rows(x, special)[::every].float().cpu())

    stream_inputs(model, {site.modules[0]: observe(rows[site.name]) for site in sites}, windows, dense_prefix)
    return {
        site.name: SiteSample(torch.cat(rows[site.name]), fisher[site.name], site.weights // site.in_features)
        for site in sites
    }


def collect_fisher(
    model: nn.Module,
    sites: Sequence[Site],
    windows: Tensor,
    dense_prefix: int = 1,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Tensor]:
    """The diagonal of the output's Fisher information by every site's input, averaged over tokens.

    Args:
        model: as for `collect_samples`.
        sites: from `find_sites`.
        windows: token ids ``[count, length]``.
        dense_prefix: first positions of each window that are not counted.
        seed: of the sampled tokens.
        progress: called after each window.

    Returns:
        Site name -> float32 ``[in_features]``, on the CPU.

    Raises:
        SponError: there are no windows, or none has a position after the prefix.
    """
    if windows.numel() == 0 or windows.shape[1] <= dense_prefix:
        raise SponError.of(
            "calibration windows", tuple(windows.shape), f"at least one window of more than {dense_prefix} tokens"
        )
    sums: dict[str, Tensor] = {}
    tokens = DenseTokens(dense_prefix)
    handles: list[Any] = [tokens.attach(model)]

    def watch(site: Site) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            special = tokens.rows(args[0])

            def add(gradient: Tensor) -> None:  # by the tensor that all linears of the site read: their sum
                squares = counted_rows(gradient, special).float().square().sum(0).cpu()
                sums[site.name] = sums.get(site.name, torch.zeros_like(squares)) + squares

            args[0].register_hook(add)

        return hook

    def differentiable(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.requires_grad_() if not output.requires_grad else output

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(differentiable))
    for site in sites:
        handles.append(model.get_submodule(site.modules[0]).register_forward_pre_hook(watch(site)))
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        for done, batch in window_batches(windows, 1):
            with torch.enable_grad():
                logits = model(input_ids=batch.to(device), use_cache=False).logits.flatten(0, 1).float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(-1)
                F.cross_entropy(logits, drawn, reduction="sum").backward()
            progress(done, len(windows))
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return {site.name: sums[site.name] / windows[:, dense_prefix:].numel() for site in sites}


def solve(
    samples: Mapping[str, SiteSample], sparsity: float, blend: float = BLEND
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Thresholds and centres that drop a share `sparsity` of the weights' inputs, on the samples.

    Args:
        samples: from `collect_samples`.
        sparsity: the target, in [0, 1).
        blend: 0 for TEAL's uniform thresholds, 1 for those of the quadratic form, their geometric mean between.

    Returns:
        Site name -> thresholds, and site name -> centres, each float32 ``[in_features]``.

    Raises:
        SponError: the target lies outside [0, 1).
    """
    if check_sparsity(sparsity) == 0:
        return (
            {name: torch.zeros_like(sample.fisher) for name, sample in samples.items()},
            {name: torch.zeros_like(sample.fisher) for name, sample in samples.items()},
        )
    shapes = {name: _log_shape(sample, sparsity, blend) for name, sample in samples.items()}
    centers = {name: torch.zeros_like(sample.fisher) for name, sample in samples.items()}
    for _ in range(3):  # centres move entries below the thresholds, which then fall
        level = _level(samples, shapes, centers, sparsity)
        thresholds = {name: (shape + level).exp() for name, shape in shapes.items()}
        centers = {name: best_centers(sample.rows, thresholds[name]) for name, sample in samples.items()}
    level = _level(samples, shapes, centers, sparsity)
    return {name: (shape + level).exp() for name, shape in shapes.items()}, centers


def _log_shape(sample: SiteSample, sparsity: float, blend: float) -> Tensor:
    """The logarithm of a site's thresholds, up to the constant that all sites share."""
    magnitudes = sample.rows.abs().flatten()
    uniform = magnitudes.kthvalue(max(1, int(sparsity * magnitudes.numel()))).values
    fisher = sample.fisher.clamp(min=max(_FLOOR * float(sample.fisher.mean()), torch.finfo(torch.float32).tiny))
    quadratic = 0.5 * (sample.outputs / fisher).log()
    smallest = torch.finfo(torch.float32).tiny
    return (1 - blend) * uniform.clamp(min=smallest).log() + blend * quadratic


def _level(
    samples: Mapping[str, SiteSample], shapes: Mapping[str, Tensor], centers: Mapping[str, Tensor], sparsity: float
) -> float:
    """The constant at which the target is met, by bisection."""
    distances = {name: (s.rows - centers[name]).abs().clamp(min=1e-30).log() for name, s in samples.items()}
    weights = {name: s.outputs * s.fisher.numel() for name, s in samples.items()}
    # Where a threshold meets an entry, the constant is their difference: the target lies between the extremes of it.
    ends = [(float((d - shapes[n]).min()), float((d - shapes[n]).max())) for n, d in distances.items()]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    for _ in range(_BISECTIONS):
        level = (low + high) / 2
        met = sum(weights[n] * float((d <= shapes[n] + level).float().mean()) for n, d in distances.items())
        low, high = (level, high) if met < sparsity * sum(weights.values()) else (low, level)
    return (low + high) / 2


def best_centers(rows: Tensor, thresholds: Tensor) -> Tensor:
    """Per channel, the `c` with the least ``E[min((x - c)^2, threshold^2)]`` that Lloyd's iteration finds.

    Args:
        rows: ``[n, in_features]``.
        thresholds: ``[in_features]``.

    Returns:
        ``[in_features]``.
    """
    best = least = None
    for center in (torch.zeros_like(thresholds), rows.median(0).values):
        for _ in range(_CENTER_STEPS):
            near = ((rows - center).abs() <= thresholds).to(rows.dtype)
            count = near.sum(0)
            center = torch.where(count > 0, (rows * near).sum(0) / count.clamp(min=1), center)
        cost = (rows - center).square().minimum(thresholds.square()).mean(0)
        if best is None or least is None:
            best, least = center, cost
        else:
            best, least = torch.where(cost < least, center, best), cost.minimum(least)
    assert best is not None
    return best


def match_sparsity(
    model: nn.Module,
    sites: Sequence[Site],
    thresholds: Mapping[str, Tensor],
    windows: Tensor,
    sparsity: float,
    dense_prefix: int = 1,
    alphas: Mapping[str, Tensor] | None = None,
    centers: Mapping[str, Tensor] | None = None,
    tolerance: float = 0.002,
    passes: int = 4,
) -> dict[str, Tensor]:
    """Multiply all thresholds by one factor, so that the sparse model itself achieves the target.

    Thresholds made on the dense model's inputs miss it by a point or two: the sparse model's inputs are others.

    Args:
        model: the dense model.
        sites: from `find_sites`.
        thresholds: module path -> float32 ``[1]`` or ``[in_features]``.
        windows: token ids ``[count, length]`` to measure on.
        sparsity: the target.
        dense_prefix: positions at the start of each window that stay dense.
        alphas: module path -> float32 ``[in_features]``, for some of the linears.
        centers: likewise.
        tolerance: how near is near enough.
        passes: over the windows, at most.

    Returns:
        Module path -> thresholds.
    """
    factor, slope = 0.0, 1 / 3  # in logarithms; a third of a point per percent is usual around one half
    before: tuple[float, float] | None = None
    for _ in range(passes):
        current = {path: threshold * torch.tensor(factor).exp() for path, threshold in thresholds.items()}
        achieved, _ = measure_sparsity(model, sites, current, windows, alphas, dense_prefix, centers=centers)
        if abs(achieved - sparsity) <= tolerance:
            return current
        if before is not None and factor != before[0]:
            slope = min(1.0, max(0.1, (achieved - before[1]) / (factor - before[0])))
        before = (factor, achieved)
        factor += (sparsity - achieved) / slope
    return {path: threshold * torch.tensor(factor).exp() for path, threshold in thresholds.items()}
