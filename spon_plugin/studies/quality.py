# SPDX-License-Identifier: Apache-2.0
"""How far a model's predictions are from a reference's, token by token: the figures of llama.cpp's scoreboard.

Perplexity hides much: two models may be as good and yet say other things. llama.cpp's `tools/perplexity/README.md`
defines what is measured beside it, with the reference's probabilities p and the model's q: the Kullback-Leibler
divergence ``sum p ln(p / q)`` of every token, its mean and 99th percentile; how often both find the same token the most
likely ("same top p"); and the root mean square of ``q - p`` at the token that stands in the text ("RMS Δp").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.decoder.positions import whole_windows
from spon_plugin.errors import SponError
from spon_plugin.progress import Progress, no_progress
from spon_plugin.studies.bootstrap import Interval, excludes_zero, interval, percentile_interval
from spon_plugin.training.loop import Teacher

Reference = Teacher
"""The model that others are compared with: its last hidden states on the windows, from which its probabilities are made
again a chunk at a time, as they themselves would be gigabytes."""

PERCENTILE = 0.99
_CHUNK_FLOATS = 1 << 24  # of one model's float32 logits at a time: 64 MiB, and about four such buffers


@dataclass(frozen=True)
class Metric:
    """A figure that is made of a mean over tokens.

    Attributes:
        title: of a column.
        column: the quantity whose mean it is, one of `TokenScores`.
        of: from the mean to the figure.
    """

    title: str
    column: str
    of: Callable[[Tensor], Tensor]

    def of_first(self, means: Tensor) -> Tensor:
        """The figure of the first of some columns of means."""
        return self.of(means[0])


METRICS = {
    "perplexity": Metric("perplexity", "nll", torch.exp),
    "kl": Metric("mean KL", "kl", lambda mean: mean),
    "same_top": Metric("same top", "same_top", lambda mean: mean),
    "rms_dp": Metric("RMS Δp", "squared_dp", torch.sqrt),
}
COMPARED = ("kl", "kl_99", "same_top", "rms_dp")
"""The figures that need a reference."""


@dataclass(frozen=True)
class TokenScores:
    """What is measured of every predicted token, float32 ``[windows, tokens]`` each.

    Attributes:
        nll: ``-ln q`` of the token in the text.
        kl: ``sum p ln(p / q)``, in nats; None without a reference, as the rest.
        same_top: 1 where both have the same most likely token, else 0.
        squared_dp: ``(q - p)^2`` of the token in the text.
    """

    nll: Tensor
    kl: Tensor | None = None
    same_top: Tensor | None = None
    squared_dp: Tensor | None = None

    def quality(self, seed: int = 0) -> Quality:
        """The figures, with their intervals by draws of that seed."""
        known = {name: tokens for name, tokens in vars(self).items() if tokens is not None}
        windows = {name: tokens.double().mean(1) for name, tokens in known.items()}
        figures, intervals = {}, {}
        for name, metric in METRICS.items():
            if metric.column in windows:
                figures[name] = float(metric.of(windows[metric.column].mean()))
                intervals[name] = interval(windows[metric.column][None], metric.of_first, seed)
        if self.kl is not None:
            figures["kl_99"] = percentile(self.kl)
            intervals["kl_99"] = percentile_interval(self.kl, PERCENTILE, seed)
        listed = {name: means.tolist() for name, means in windows.items()}
        return Quality(**figures, intervals={n: i for n, i in intervals.items() if i is not None}, windows=listed)


@dataclass(frozen=True)
class Quality:
    """A model's figures on one text.

    Attributes:
        perplexity: over all tokens.
        kl: mean divergence from the reference, in nats a token; None without one, as the next three.
        kl_99: its 99th percentile over tokens.
        same_top: the share of tokens of which both models have the same most likely one.
        rms_dp: root mean square of the change of the text's token's probability.
        intervals: figure -> its confidence interval; empty with too few windows, see `bootstrap`.
        windows: quantity of `TokenScores` -> its mean in every window, from which differences are made.
    """

    perplexity: float
    kl: float | None = None
    kl_99: float | None = None
    same_top: float | None = None
    rms_dp: float | None = None
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    windows: Mapping[str, list[float]] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """For a study's row; figures that need a reference are left out without one."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Change:
    """A difference between two models on the same windows.

    Attributes:
        value: second less first; of perplexity, as a share of the first's.
        ends: its confidence interval; None with too few windows.
    """

    value: float
    ends: Interval | None

    @property
    def certain(self) -> bool:
        """Whether it may be called a difference: zero lies outside the interval."""
        return excludes_zero(self.ends)


@torch.no_grad()
def score(
    model: nn.Module,
    windows: Tensor,
    first: int = 0,
    batch_size: int = 4,
    progress: Progress = no_progress,
    reference: Reference | None = None,
) -> TokenScores:
    """Run a model over windows and measure its predictions.

    The logits of one batch are held at a time, and a chunk of them in float32.

    Args:
        model: anything that maps ``input_ids=`` to an object with ``logits`` ``[batch, length, vocabulary]``.
        windows: token ids ``[count, length]``.
        first: the first position whose prediction counts.
        batch_size: windows per forward pass.
        progress: called after each pass.
        reference: on the same windows; its vocabulary is the model's.

    Raises:
        SponError: it is not.
    """
    device = next(model.parameters()).device
    rows: list[dict[str, Tensor]] = []
    for start in range(0, len(windows), batch_size):
        ids = windows[start : start + batch_size].to(device)
        with whole_windows():
            logits = model(input_ids=ids).logits[:, first:-1]
        for row, (own, target) in enumerate(zip(logits, ids[:, first + 1 :], strict=True), start):
            chunks = []
            for part in _parts(len(target), own.shape[-1]):
                kept = (
                    None if reference is None else reference.logits(row, slice(first + part.start, first + part.stop))
                )
                chunks.append(_measured(own[part], target[part], kept))
            rows.append({name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})
        progress(start + len(ids), len(windows))
    return TokenScores(**{name: torch.stack([row[name] for row in rows]).cpu() for name in rows[0]})


def _parts(tokens: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, _CHUNK_FLOATS // vocabulary)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _measured(logits: Tensor, target: Tensor, reference: Tensor | None) -> dict[str, Tensor]:
    """The quantities of `TokenScores` for logits ``[tokens, vocabulary]``."""
    own = logits.float().log_softmax(-1)
    place = target[:, None]
    said = own.gather(1, place)[:, 0]
    if reference is None:
        return {"nll": -said}
    if reference.shape != own.shape:
        received, expected = f"a vocabulary of {reference.shape[-1]}", f"one of {own.shape[-1]}, as the model's"
        raise SponError.of("reference", received, expected)
    other = reference.to(own.device).float().log_softmax(-1)
    change = said.exp() - other.gather(1, place)[:, 0].exp()
    same = (own.argmax(-1) == other.argmax(-1)).float()
    kl = (other.exp() * other.sub(own)).sum(-1)
    return {"nll": -said, "kl": kl, "same_top": same, "squared_dp": change.square()}


def percentile(values: Tensor, share: float = PERCENTILE) -> float:
    """A percentile of all values, between two of them along a straight line, as llama.cpp has it."""
    ordered = values.flatten().double().sort().values
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))


def changes(before: Mapping[str, Any], after: Mapping[str, Any], seed: int = 0) -> dict[str, Change]:
    """How `after` differs from `before`, figure by figure, with paired intervals.

    The 99th percentile is left out: rows keep means of windows, not tokens.

    Args:
        before: `Quality.windows` of a model.
        after: of another, on the same windows.
        seed: of the draws.
    """
    found = {}
    for name, metric in METRICS.items():
        columns = [side.get(metric.column) for side in (before, after)]
        if not all(column and all(value is not None for value in column) for column in columns):
            continue
        means = torch.tensor(columns, dtype=torch.float64)

        def difference(mean: Tensor, metric: Metric = metric) -> Tensor:
            if metric.column == "nll":
                return (mean[1] - mean[0]).expm1()
            return metric.of(mean[1]) - metric.of(mean[0])

        found[name] = Change(float(difference(means.mean(1))), interval(means, difference, seed))
    return found
