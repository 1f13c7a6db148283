# SPDX-License-Identifier: Apache-2.0
"""Thresholds and centres per channel from how much the model's output feels each channel of each linear's input.

Setting entry `x_i` of a linear's input to `c_i` moves the output by ``KL ~ f_i (x_i - c_i)^2 / 2``, where `f_i` is the
diagonal of the Fisher information: the mean squared gradient of ``log p(y)`` by `x_i`, `y` drawn from the model itself
(optimal brain damage, LeCun et al. 1989, on activations). It saves the `o` weights that the linear has per entry.
Dropping what costs least per weight, at a price `lambda` per weight that is the same in the whole model, means

    drop where f_i (x_i - c_i)^2 < lambda o,    so    threshold_i = sqrt(lambda o / f_i),

which spreads the target over layers, linears and channels at once. Given the thresholds, the best `c_i` is the mean of
the entries that are dropped, which depends on `c_i`: it is found by iteration (Lloyd), from zero and from the median.
The linears of a site share it, so that a layer which fuses them can subtract it once.

The first position is one of hundreds and the one that every other attends to: its own `f_i` are far above the mean, and
where its keys and values are zero, a centre that serves the others makes them something else for all. So entries of the
first positions count in the centres by sensitivities of their own.

The quadratic form holds for small errors, and half of a model's inputs is not small: taken literally it overdoes the
differences. So thresholds are the geometric mean (`BLEND`) of these and TEAL's uniform ones.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from spon_plugin.adapter.mask import Mask
from spon_plugin.calibration.gradients import ObserveGradient, stream_gradients
from spon_plugin.calibration.measurement import measure_sparsity
from spon_plugin.calibration.streaming import SINKS, check_windows, first_positions
from spon_plugin.decoder.sites import Site, module_weights
from spon_plugin.masking import check_sparsity
from spon_plugin.progress import Progress, no_progress

BLEND = 0.5
RATE = 1 / 3
"""The part of a schedule's learning rate that alphas want under these centres, which are the means already: a whole one
made SmolLM2-135M worse for the first ten steps at 50%, and left it 4% behind after forty."""
SAMPLE_ROWS = 2048
MATCH_TOKENS = 4096
# A channel that the calibration text never moved is not free: its sensitivity counts as at least this share of the
# linear's mean.
_FLOOR = 1e-3
_TINY = torch.finfo(torch.float32).tiny
_CENTER_STEPS = 8
_ROUNDS = 2
_BISECTIONS = 20


@dataclass
class Group:
    """Inputs of a site that count alike.

    Attributes:
        rows: ``[n, in_features]``, float32.
        importance: of each linear of the site, ``[in_features]``: its sensitivity at these inputs, times their share of
            all tokens.
    """

    rows: Tensor
    importance: list[Tensor]

    def to(self, device: torch.device) -> Group:
        """The same on a device."""
        return Group(self.rows.to(device), [values.to(device) for values in self.importance])


@dataclass
class Sensitivities:
    """How much the output feels the inputs of linears: mean squared gradients of the log-likelihood.

    Attributes:
        counted: module path -> float32 ``[in_features]``, over the counted tokens.
        first: the same over the first positions that are masked but not counted; empty where there are none.
        first_rows: path of a site's first linear -> float32 ``[windows * positions, in_features]``, its input there.
        first_share: their share of all masked tokens.
    """

    counted: dict[str, Tensor]
    first: dict[str, Tensor]
    first_rows: dict[str, Tensor]
    first_share: float

    def groups(self, rows: Tensor, paths: Sequence[str]) -> list[Group]:
        """What the centres of the site of these linears are made from; `rows` are its counted inputs."""
        groups = [Group(rows, [self.counted[path] * (1 - self.first_share) for path in paths])]
        if self.first:
            groups.append(Group(self.first_rows[paths[0]], [self.first[path] * self.first_share for path in paths]))
        return groups


@dataclass
class SiteSample:
    """What the thresholds of a site's linears are made from.

    Attributes:
        rows: inputs ``[n, in_features]`` of the dense model, float32.
        fisher: module path -> float32 ``[in_features]``, the mean squared gradient of the log-likelihood by the input.
        outputs: module path -> out_features: how many weights an entry of the input meets.
        groups: what the centres are made from: the rows, and the first positions where these are masked. The rows
            alone if empty.
    """

    rows: Tensor
    fisher: dict[str, Tensor]
    outputs: dict[str, int]
    groups: list[Group] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Without groups the rows are the only one."""
        self.groups = self.groups or [Group(self.rows, list(self.fisher.values()))]

    def to(self, device: torch.device) -> SiteSample:
        """The same on a device."""
        fisher = {path: values.to(device) for path, values in self.fisher.items()}
        return SiteSample(self.rows.to(device), fisher, self.outputs, [group.to(device) for group in self.groups])

    @property
    def nbytes(self) -> int:
        """Of the inputs."""
        return sum(group.rows.nbytes for group in self.groups)


class RowSample:
    """Some of the inputs of a site, spread over the text.

    Args:
        every: one row in so many of a batch is kept.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._rows: list[Tensor] = []

    @classmethod
    def of(cls, windows: Tensor, skip: int, max_rows: int = SAMPLE_ROWS) -> RowSample:
        """A sample of about `max_rows` of the counted tokens of ``windows [count, length]``."""
        return cls(max(1, -(-windows[:, skip:].numel() // max_rows)))

    def update(self, rows: Tensor) -> None:
        """See ``[tokens, in_features]``."""
        self._rows.append(rows[:: self.every].float().cpu())

    @property
    def rows(self) -> Tensor:
        """All that was kept, float32 ``[n, in_features]``, on the CPU."""
        return torch.cat(self._rows)

    def sample(self, site: Site, fisher: Sensitivities) -> SiteSample:
        """What `solve` takes, with the sensitivities of the site's linears from `collect_fisher`."""
        outputs = {p: n // site.in_features for p, n in zip(site.modules, site.module_weights, strict=True)}
        rows, counted = self.rows, {path: fisher.counted[path] for path in site.modules}
        return SiteSample(rows, counted, outputs, fisher.groups(rows, site.modules))


def collect_fisher(
    model: nn.Module,
    sites: Sequence[Site],
    windows: Tensor,
    skip: int = SINKS,
    dense_prefix: int = 0,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Sensitivities:
    """The diagonal of the output's Fisher information by every linear's input, averaged over tokens.

    Args:
        model: a dense decoder that maps ``input_ids=`` to an object with ``logits``.
        sites: from `find_sites`.
        windows: token ids ``[count, length]``.
        skip: first positions of each window that are not counted.
        dense_prefix: how many of these are never masked; the others are averaged by themselves.
        seed: of the sampled tokens.
        progress: called after each window.

    Returns:
        The averages, on the CPU.

    Raises:
        SponError: there are no windows, or none has a position after the prefix.
    """
    check_windows(windows, skip)
    shape, masked_first = windows[:1].shape, max(0, skip - dense_prefix)
    counted: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    first: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    first_rows: dict[str, list[Tensor]] = {site.modules[0]: [] for site in sites}

    def watch(path: str) -> ObserveGradient:
        def observe(x: Tensor, gradient: Tensor) -> None:
            special = first_positions(x, shape, skip)
            squares = gradient.float().square()
            counted[path] = counted[path] + _chosen(squares, None if special is None else ~special)
            if special is not None and masked_first:
                dense = first_positions(x, shape, dense_prefix)
                apart = special if dense is None else special & ~dense
                first[path] = first[path] + _chosen(squares, apart)
                if path in first_rows:
                    first_rows[path].append(x[apart].float().cpu())

        return observe

    observers = {path: watch(path) for path in module_weights(sites)}
    stream_gradients(model, observers, windows, seed, progress)
    return Sensitivities(
        counted={path: total.cpu() / windows[:, skip:].numel() for path, total in counted.items()},
        first={path: total.cpu() / (len(windows) * masked_first) for path, total in first.items()},
        first_rows={path: torch.cat(rows) for path, rows in first_rows.items() if rows},
        first_share=masked_first / (windows.shape[1] - skip + masked_first),
    )


def _chosen(values: Tensor, rows: Tensor | None) -> Tensor:
    """The sum of ``values [..., features]`` over some rows, bool ``[...]``, or all; without waiting for a device."""
    if rows is not None:
        values = values.where(rows.unsqueeze(-1), 0)
    return values.flatten(0, -2).sum(0)


def solve(samples: Sequence[SiteSample], sparsity: float, blend: float = BLEND) -> dict[str, Mask]:
    """Masks that leave a share `sparsity` of the weights unused, on the samples.

    Args:
        samples: of every site, from `RowSample.sample`; the work is done where they are.
        sparsity: the target, in [0, 1).
        blend: 0 for TEAL's uniform thresholds, 1 for those of the quadratic form, their geometric mean between.

    Returns:
        Module path -> thresholds and centres, each float32 ``[in_features]``, on the CPU; the linears of a site have
        the same centres.

    Raises:
        SponError: the target lies outside [0, 1).
    """
    check_sparsity(sparsity)
    centers = [sample.rows.new_zeros(sample.rows.shape[1]) for sample in samples]
    if sparsity == 0:
        nothing = {path: torch.zeros_like(f) for sample in samples for path, f in sample.fisher.items()}
        return {path: Mask(zero, zero.clone()).to("cpu") for path, zero in nothing.items()}
    shapes = [_log_shapes(sample, sparsity, blend) for sample in samples]
    level = _level(samples, shapes, centers, sparsity)
    for _ in range(_ROUNDS):  # centres bring entries below the thresholds, which then fall
        for index, (sample, shape) in enumerate(zip(samples, shapes, strict=True)):
            thresholds = [(log + level).exp() for log in shape.values()]
            centers[index] = best_centers(sample.groups, thresholds)
        level = _level(samples, shapes, centers, sparsity)
    return {
        path: Mask((log + level).exp(), center.clone()).to("cpu")
        for shape, center in zip(shapes, centers, strict=True)
        for path, log in shape.items()
    }


def where_there_is_room(samples: Sequence[SiteSample], device: torch.device) -> list[SiteSample]:
    """The samples on an accelerator that has room for what `solve` makes of them; otherwise as they are."""
    if device.type != "cuda":
        return list(samples)
    needed = sum(sample.nbytes * (2 + len(sample.fisher)) for sample in samples)
    free, _ = torch.cuda.mem_get_info(device)
    return [sample.to(device) for sample in samples] if needed < free else list(samples)


def _log_shapes(sample: SiteSample, sparsity: float, blend: float) -> dict[str, Tensor]:
    """The logarithms of a site's thresholds by module path, up to the constant that all sites share."""
    magnitudes = sample.rows.abs().flatten()
    uniform = magnitudes.kthvalue(max(1, int(sparsity * magnitudes.numel()))).values.clamp(min=_TINY).log()
    shapes = {}
    for path, fisher in sample.fisher.items():
        floored = fisher.clamp(min=max(_FLOOR * float(fisher.mean()), _TINY))
        shapes[path] = (1 - blend) * uniform + blend * 0.5 * (sample.outputs[path] / floored).log()
    return shapes


def _level(
    samples: Sequence[SiteSample], shapes: Sequence[Mapping[str, Tensor]], centers: Sequence[Tensor], sparsity: float
) -> float:
    """The constant at which the target is met, by bisection over logarithms of distance over threshold."""
    excess = [
        ((sample.rows - center).abs().clamp(min=_TINY).log() - log, sample.outputs[path])
        for sample, shape, center in zip(samples, shapes, centers, strict=True)
        for path, log in shape.items()
    ]
    return level_below([e for e, _ in excess], [outputs for _, outputs in excess], sparsity, _BISECTIONS)


def level_below(values: Sequence[Tensor], outputs: Sequence[int], share: float, halvings: int) -> float:
    """The level below which a share of the weights lies, by bisection; a device is waited for once a halving.

    Args:
        values: of the entries of each linear's or site's inputs, ``[tokens, in_features]``.
        outputs: how many weights an entry of each meets.
        share: of all weights, in [0, 1].
        halvings: of the range of the values.
    """
    wanted = share * sum(count * x.shape[1] for x, count in zip(values, outputs, strict=True))
    low = float(torch.stack([x.min() for x in values]).min())
    high = float(torch.stack([x.max() for x in values]).max())
    for _ in range(halvings):
        level = (low + high) / 2
        below = torch.stack([(x <= level).float().mean() for x in values]).tolist()
        met = sum(count * x.shape[1] * part for x, count, part in zip(values, outputs, below, strict=True))
        low, high = (level, high) if met < wanted else (low, level)
    return (low + high) / 2


def best_centers(groups: Sequence[Group], thresholds: Sequence[Tensor]) -> Tensor:
    """Per channel, the `c` with the least ``E[sum_l f_l min((x - c)^2, threshold_l^2)]`` that Lloyd's iteration finds.

    Args:
        groups: the inputs ``x`` that all linears share, and the ``f_l`` of each linear at them, in shares of all.
        thresholds: ``[in_features]`` of each linear.

    Returns:
        ``[in_features]``.
    """
    rows = groups[0].rows
    best = least = None
    for center in (rows.new_zeros(rows.shape[1]), rows.median(0).values):
        for _ in range(_CENTER_STEPS):
            weight, moment = torch.zeros_like(center), torch.zeros_like(center)
            for group in groups:
                near = _total(
                    f * ((group.rows - center).abs() <= t).to(rows.dtype)
                    for t, f in zip(thresholds, group.importance, strict=True)
                )
                weight += near.mean(0)
                moment += (group.rows * near).mean(0)
            center = torch.where(weight > 0, moment / weight.clamp(min=_TINY), center)
        cost = _total(
            f * (group.rows - center).square().minimum(t.square()).mean(0)
            for group in groups
            for t, f in zip(thresholds, group.importance, strict=True)
        )
        if best is None or least is None:
            best, least = center, cost
        else:
            best, least = torch.where(cost < least, center, best), cost.minimum(least)
    assert best is not None
    return best


def _total(parts: Iterable[Tensor]) -> Tensor:
    """Their sum, of one at least."""
    return functools.reduce(torch.add, parts)


def match_sparsity(
    model: nn.Module,
    sites: Sequence[Site],
    masks: Mapping[str, Mask],
    windows: Tensor,
    sparsity: float,
    dense_prefix: int = 0,
    tolerance: float = 0.002,
    passes: int = 4,
) -> dict[str, Mask]:
    """Multiply all thresholds by one factor, so that the sparse model itself achieves the target.

    Thresholds made on the dense model's inputs miss it by a point or two: the sparse model's inputs are others.
    The first `MATCH_TOKENS` tokens are measured on.

    Args:
        model: the dense model.
        sites: from `find_sites`.
        masks: module path -> mask, with its alpha.
        windows: token ids ``[count, length]`` to measure on.
        sparsity: the target.
        dense_prefix: positions at the start of each window that stay dense.
        tolerance: how near is near enough.
        passes: over the windows, at most.

    Returns:
        The masks at their new thresholds.
    """
    windows = windows[: max(1, MATCH_TOKENS // windows.shape[1])]

    def achieved(logarithm: float) -> float:
        return measure_sparsity(model, sites, scaled(masks, logarithm), windows, dense_prefix)[0]

    return scaled(masks, matching_factor(achieved, sparsity, tolerance, passes))


def matching_factor(
    achieved: Callable[[float], float], sparsity: float, tolerance: float = 0.002, passes: int = 4
) -> float:
    """The logarithm of the factor on all thresholds at which a sparse model has the target.

    Args:
        achieved: its sparsity at the logarithm of a factor.
        sparsity: the target.
        tolerance: how near is near enough.
        passes: how often `achieved` is asked, at most.
    """
    factor, slope = 0.0, 1 / 3  # a third of a point per percent is usual around one half
    before: tuple[float, float] | None = None
    for _ in range(passes):
        now = achieved(factor)
        if abs(now - sparsity) <= tolerance:
            return factor
        if before is not None and factor != before[0]:
            slope = min(1.0, max(0.1, (now - before[1]) / (factor - before[0])))
        before = (factor, now)
        factor += (sparsity - now) / slope
    return factor


def scaled(masks: Mapping[str, Mask], logarithm: float) -> dict[str, Mask]:
    """The masks at thresholds that are ``exp(logarithm)`` times as high."""
    factor = torch.tensor(logarithm).exp()
    return {path: replace(mask, threshold=mask.threshold * factor) for path, mask in masks.items()}
