# SPDX-License-Identifier: Apache-2.0
"""How alphas are trained: the schedule, as data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.calibration.sensitivity import RATE
from spon_plugin.errors import SponError
from spon_plugin.training.objective import Objective

_LOSS = {field.name: field.default for field in fields(Objective)}


@dataclass(frozen=True)
class Recipe:
    """A training schedule for alphas.

    Attributes:
        windows: training windows, taken evenly from all texts.
        window: tokens per window.
        batch_size: windows per step.
        epochs: passes over the windows.
        learning_rate: Adam's, at its highest; in units of each layer's scale (`alpha_scales`) if `relative`.
        relative: alphas stand in for entries below the threshold, and thresholds differ fifty-fold between layers; one
            absolute rate is noise for some layers and standstill for others.
        warmup: the share of the steps in which the rate rises; it falls along a cosine afterwards.
        max_grad_norm: the gradient over all alphas is clipped to this norm.
        weight_decay: AdamW's, of an alpha in the units of its rate: a step takes ``rate * weight_decay`` of it away.
        temperature: of the loss, as in `Objective`.
        top_k: likewise.
        entropy_power: likewise.
        hidden_weight: likewise.
        hidden_blocks: likewise.
        rematch: how often, evenly over the first two thirds of the steps, thresholds are brought back to their target
            in the sparse model with the alphas of that moment; the last third runs at the final ones. 0 for never.
    """

    windows: int
    window: int
    batch_size: int
    epochs: int
    learning_rate: float
    relative: bool = True
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    entropy_power: float = 0.0
    hidden_weight: float = 0.0
    hidden_blocks: int = 4
    rematch: int = 0

    @property
    def objective(self) -> Objective:
        """What is minimized.

        Raises:
            SponError: an option of the loss is out of its range.
        """
        return Objective(**{name: getattr(self, name) for name in _LOSS})

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.epochs * max(1, self.windows // self.batch_size)

    @property
    def rematch_steps(self) -> list[int]:
        """The numbers of steps after which thresholds are brought to the target; the same number once."""
        last = 2 * self.steps // 3
        return list(dict.fromkeys(round(last * (turn + 1) / self.rematch) for turn in range(self.rematch) if last))

    def factor(self, step: int) -> float:
        """What the rate is multiplied by at a step, counted from 0: a linear rise, then half a cosine down to 0."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return step / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))

    def rate(self, scale: float) -> float:
        """A layer's highest rate.

        Args:
            scale: the layer's.
        """
        return self.learning_rate * scale if self.relative else self.learning_rate

    def decay(self, scale: float) -> float:
        """A layer's weight decay, for an optimizer that multiplies it by the layer's `rate`.

        Args:
            scale: the layer's.
        """
        return self.weight_decay / scale if self.relative and scale > 0 else self.weight_decay

    def with_changes(self, **changes: Any) -> Recipe:
        """This recipe with some values replaced; None leaves a value as it is.

        Raises:
            SponError: a value is not positive, a weight decay or `rematch` is negative, or an option of the loss is out
                of range.
        """
        changed = {name: value for name, value in changes.items() if value is not None}
        Objective(**{name: value for name, value in changed.items() if name in _LOSS})
        for name, value in ((name, value) for name, value in changed.items() if name not in _LOSS):
            if name in ("weight_decay", "rematch") and not 0 <= value < math.inf:
                raise SponError.of(name, value, "a number of at least 0")
            if name not in ("weight_decay", "rematch") and not value > 0:
                raise SponError.of(name, value, "a positive number")
        return replace(self, **changed)

    def as_dict(self) -> dict[str, Any]:
        """For the adapter's `calibration` field; `rematch` and options of the loss are left out at their defaults."""
        plain = {name: value for name, value in asdict(self).items() if name not in (*_LOSS, "rematch")}
        return plain | ({"rematch": self.rematch} if self.rematch else {}) | self.loss_options

    @property
    def loss_options(self) -> dict[str, float]:
        """The options of the loss that are not as by default."""
        return {name: getattr(self, name) for name, default in _LOSS.items() if getattr(self, name) != default}


PRESETS = {
    # Short and fast: a real adapter over lunch on a laptop, minutes on a GPU.
    "fast": Recipe(windows=300, window=256, batch_size=2, epochs=1, learning_rate=0.015),
    # The schedule of arXiv 2512.12744: rate 1e-5, ten epochs, batch 8, blocks of 128.
    "paper": Recipe(windows=2048, window=128, batch_size=8, epochs=10, learning_rate=1e-5, relative=False),
    # What `spon recover` found to be best: ten times the tokens of "fast", long windows, thresholds held at the target.
    "best": Recipe(windows=1600, window=512, batch_size=8, epochs=1, learning_rate=0.015, rematch=6),
}


def alpha_scales(adapter: Adapter) -> dict[str, float]:
    """Module path -> the unit of alpha's learning rate: `SponFields.alpha_scale`, which the method made.

    Adapters that do not say it have the typical threshold: the median where there is one per channel, as a threshold
    may be as large as numbers get; under ``sensitivity`` `calibration.sensitivity.RATE` of the mean.
    """
    known = adapter.fields.alpha_scale
    sensitive = adapter.fields.allocation == "sensitivity"
    typical = {
        path: RATE * float(mask.threshold.mean()) if sensitive else float(mask.threshold.median())
        for path, mask in adapter.masks.items()
    }
    return {path: known.get(path, scale) for path, scale in typical.items()}


def preset(name: str) -> Recipe:
    """The preset of that name.

    Raises:
        SponError: there is none.
    """
    if name not in PRESETS:
        raise SponError.of("preset", name, "one of " + ", ".join(PRESETS))
    return PRESETS[name]
