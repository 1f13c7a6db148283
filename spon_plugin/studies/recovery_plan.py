# SPDX-License-Identifier: Apache-2.0
"""The rows of `spon recover`: from uniform TEAL to the best that is known, one step at a time, and what was tried."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from spon_plugin.training.deltas import RANK
from spon_plugin.training.extension import Extension
from spon_plugin.training.recipe import PRESETS, Recipe

TEAL, SENSITIVITY = "teal", "sensitivity"
UNIFORM = "uniform TEAL"
COMMON = "own samples in the mix"
"""What rows that try one thing have in common, but for that."""
BEST = "four times the steps"
TUNED = "tuned weights, too"


@dataclass(frozen=True)
class Row:
    """What a row is.

    Attributes:
        label: in words.
        sparsity: the target.
        method: of the masks.
        recipe: of the alphas; None for masks alone.
        texts: how many of the training texts, from the first; None for all.
        extension: trained beside alpha.
        deltas: the rank of what is trained beside alpha and merged into the weights; 0 for nothing.
        seed: of the order of the windows.
    """

    label: str
    sparsity: float
    method: str = SENSITIVITY
    recipe: Recipe | None = None
    texts: int | None = None
    extension: Extension = field(default_factory=Extension)
    deltas: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the row's file."""
        digest = hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:10]
        words = "".join(c if c.isalnum() else "-" for c in self.label.lower())
        return f"{100 * self.sparsity:g}-{words}-seed{self.seed}-{digest}"

    def as_dict(self) -> dict[str, Any]:
        """For the row's file; without `deltas` where there are none."""
        recipe = None if self.recipe is None else self.recipe.as_dict()
        found = {**asdict(self), "recipe": recipe, "extension": self.extension.as_dict()}
        return found if self.deltas else {name: value for name, value in found.items() if name != "deltas"}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Row:
        """The row of a file that `as_dict` is part of."""
        recipe = None if row["recipe"] is None else Recipe(**row["recipe"])
        values = {name: row[name] for name in ("label", "sparsity", "method", "texts", "seed")}
        return cls(**values, recipe=recipe, extension=Extension(**row["extension"]), deltas=row.get("deltas", 0))


def rows(
    sparsities: Sequence[float],
    steps: int,
    batch_size: int,
    window: int,
    paper: bool = True,
    seeds: int = 3,
    method: str = SENSITIVITY,
) -> list[Row]:
    """The rows, the most telling first.

    Args:
        sparsities: the targets; what is tried beside the steps is tried at the first.
        steps: of the common schedule.
        batch_size: windows per step.
        window: tokens per window.
        paper: whether the paper's own schedule is among them.
        seeds: of the rows that claims rest on.
        method: of the rows that are not on uniform TEAL.
    """
    first = sparsities[0]
    fast = replace(PRESETS["fast"], windows=600)
    final = replace(fast, rematch=PRESETS["best"].rematch)
    large = replace(final, windows=steps * batch_size, batch_size=batch_size, window=window)
    long = replace(large, windows=4 * large.windows)
    found: list[Row] = []
    for s in sparsities:
        found += [Row(UNIFORM, s, TEAL), Row("sensitivity", s)]
    if paper:
        found.append(Row("the paper's schedule on uniform TEAL", first, TEAL, PRESETS["paper"], 2))
    for s in sparsities:
        found.append(Row(BEST, s, recipe=long))
    for s in sparsities:
        found.append(Row("alpha, 300 steps of 2 x 256", s, recipe=fast, texts=2))
    for s in sparsities:
        found.append(Row("at the final thresholds", s, recipe=final, texts=2))
    for s in sparsities:
        found.append(Row(f"steps of {batch_size} x {window}", s, recipe=large, texts=2))
    for s in sparsities:
        found.append(Row(COMMON, s, recipe=large))
    tried: list[tuple[str, dict[str, Any], Extension]] = [
        ("centres trained, too", {}, Extension(centers=True)),
        ("rank 4", {}, Extension(rank=4)),
        ("a tenth of the rate for rank 4", {}, Extension(rank=4, rank_rate=0.1)),
        ("gains at 0.002", {}, Extension(gain_rate=0.002)),
        ("centres and gains", {}, Extension(centers=True, gain_rate=0.002)),
        ("twice the rate", {"learning_rate": 2 * large.learning_rate}, Extension()),
        ("half the rate", {"learning_rate": large.learning_rate / 2}, Extension()),
        ("hidden states, 4 blocks", {"hidden_weight": 1.0}, Extension()),
        ("uncertain tokens more", {"entropy_power": 1.0}, Extension()),
        ("rank 1", {}, Extension(rank=1)),
        ("rank 16", {}, Extension(rank=16)),
        ("top 64 and one bin", {"top_k": 64}, Extension()),
        ("temperature 2", {"temperature": 2.0}, Extension()),
    ]
    trials = [Row(label, first, recipe=replace(large, **changes), extension=ext) for label, changes, ext in tried]
    found += [*trials[:9], Row(TUNED, first, recipe=large, deltas=RANK)]
    found += [Row(f"{TUNED}, {BEST}", s, recipe=long, deltas=RANK) for s in sparsities]
    found.append(Row(f"centres trained, too, {BEST}", first, recipe=long, extension=Extension(centers=True)))
    for s in sparsities:
        found += [Row(BEST, s, recipe=long, seed=seed) for seed in range(1, seeds)]
    found += trials[9:]
    found += [Row(COMMON, s, recipe=large, seed=seed) for s in sparsities for seed in range(1, seeds)]
    found.append(Row("alpha on uniform TEAL", first, TEAL, large))
    return [replace(row, method=method) if row.method == SENSITIVITY else row for row in found]
