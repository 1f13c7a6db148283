# SPDX-License-Identifier: Apache-2.0
"""Trials that differ in one thing: where alpha is, how long it trained and on what, how sparse the model is."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from torch import Tensor

from spon_plugin.errors import SponError
from spon_plugin.sparsifiers import SPARSIFIERS, Fitted, get_sparsifier
from spon_plugin.sparsifiers.thresholds import ThresholdSparsifier
from spon_plugin.studies.bench import Bench
from spon_plugin.studies.rows import RowStore
from spon_plugin.training.loop import loss_ends
from spon_plugin.training.recipe import Recipe

DENSE = "dense"

Pools = Mapping[tuple[tuple[str, ...], int], Tensor]
"""Mix of texts and tokens per window -> token ids ``[count, window]``."""


@dataclass(frozen=True)
class Trial:
    """One row: everything that a trial may differ in.

    Attributes:
        sparsity: the target.
        texts: names of the texts that thresholds and alphas come from, an even mix.
        calibration_tokens: how many of their tokens the thresholds come from.
        carriers: paths of the linears with a trained alpha; none for the masks alone.
        recipe: the schedule of the alphas; None without them.
        dense_prefix: first positions of a sequence that stay dense.
        matched: whether the thresholds are held at the target in the sparse model itself, after training as well.
    """

    sparsity: float
    texts: tuple[str, ...]
    calibration_tokens: int
    carriers: tuple[str, ...] = ()
    recipe: Recipe | None = None
    dense_prefix: int = 0
    matched: bool = False

    @property
    def masks(self) -> Trial:
        """The same without alpha: what a share of the gap is measured against."""
        return replace(self, carriers=(), recipe=None)

    def calibration_windows(self, window: int) -> int:
        """How many windows of that many tokens the thresholds come from."""
        return max(1, self.calibration_tokens // window)

    @property
    def name(self) -> str:
        """Of the row's file: the same trial in two studies is measured once."""
        digest = hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]
        return f"{100 * self.sparsity:g}-{f'alpha{len(self.carriers)}' if self.carriers else 'masks'}-{digest}"

    def as_dict(self) -> dict[str, Any]:
        """For the row's file."""
        return {
            "sparsity": self.sparsity,
            "texts": list(self.texts),
            "calibration_tokens": self.calibration_tokens,
            "carriers": list(self.carriers),
            "recipe": None if self.recipe is None else self.recipe.as_dict(),
            "dense_prefix": self.dense_prefix,
            "matched": self.matched,
        }

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Trial:
        """The trial of a row that `as_dict` is part of."""
        values = {f.name: row[f.name] for f in fields(cls)}
        recipe = None if row["recipe"] is None else Recipe(**row["recipe"])
        return cls(**{**values, "texts": tuple(row["texts"]), "carriers": tuple(row["carriers"]), "recipe": recipe})


@dataclass(kw_only=True)
class Ablation(Bench):
    """What all trials have in common.

    Attributes:
        pools: what trials take from, from the start, so that fewer tokens are part of more.
        window: tokens per window to calibrate on; a trial trains on windows of its recipe.
        method: name of a sparsifier.
    """

    pools: Pools
    window: int
    method: str = "teal"

    def check(self, trials: Sequence[Trial]) -> None:
        """Check what a run needs.

        Raises:
            SponError: there is no such method, or it does not cover every linear at every sparsity; a trial has fewer
                windows than a step takes; or a text is shorter than a trial needs.
        """
        if not get_sparsifier(self.method).universal:
            every = ", ".join(name for name, cls in SPARSIFIERS.items() if cls.universal)
            raise SponError.of("method", self.method, f"one that covers every linear at every sparsity: {every}")
        if any(trial.matched for trial in trials) and not isinstance(get_sparsifier(self.method), ThresholdSparsifier):
            raise SponError.of("method", self.method, "one with thresholds, to be matched to the target", "Use teal.")
        for trial in trials:
            if trial.recipe is not None and trial.recipe.windows < trial.recipe.batch_size:
                raise SponError.of("windows", trial.recipe.windows, f"at least {trial.recipe.batch_size}, one step's")
            needs = [(self.window, trial.calibration_windows(self.window))]
            if trial.recipe is not None:
                needs.append((trial.recipe.window, trial.recipe.windows))
            for window, count in needs:
                have = len(self.pools[trial.texts, window])
                if have < count:
                    expected = f"at least {count} windows of {window} tokens for this study"
                    raise SponError.of(f"text {' + '.join(trial.texts)}", f"{have} windows", expected, "Use more text.")

    def run(self, trials: Sequence[Trial], store: RowStore) -> dict[str, dict[str, Any]]:
        """Measure every trial that `store` does not have, with the dense model and the masks alone of each.

        Returns:
            Name -> row, the dense model's under ``dense``.

        Raises:
            SponError: see `check`, before any work.
        """
        wanted = plan(trials)
        self.check(wanted)
        rows = {DENSE: store.kept(DENSE, lambda: {"name": DENSE, "tests": self.evaluate(None, DENSE)}, self.done)}
        missing = [trial for trial in wanted if not store.has(trial.name)]
        for trial in wanted:
            rows[trial.name] = store.kept(trial.name, partial(self._measure, trial, missing), self.done)
        return rows

    def _measure(self, trial: Trial, missing: Sequence[Trial]) -> dict[str, Any]:
        label = describe(trial)
        windows = self.pools[trial.texts, self.window][: trial.calibration_windows(self.window)]
        fitted, calibrating = self.fit(self.method, windows, trial.sparsity)
        fitted = self._adjusted(trial, fitted, windows)
        seconds = {"calibration": calibrating}
        row: dict[str, Any] = {"name": trial.name, **trial.as_dict()}
        added: dict[str, Any] = {}
        if trial.recipe is not None:
            start = time.perf_counter()
            training = self._training(trial.recipe.window, trial.texts, missing)
            teacher = self.dense_states(training, trial.recipe.objective)
            teacher = teacher.first(trial.recipe.windows)
            row["training_tokens"] = int(teacher.windows.numel())
            seconds["dense states"] = time.perf_counter() - start
            start = time.perf_counter()
            alphas, losses = self.train(fitted, teacher, trial.recipe, list(trial.carriers), label)
            seconds["training"] = time.perf_counter() - start
            row["loss"] = loss_ends(losses)
            added = {"alphas": alphas}
            fitted = self._adjusted(trial, fitted, windows, alphas)
        start = time.perf_counter()
        row["tests"] = self.evaluate(fitted, label, **added)
        seconds["evaluation"] = time.perf_counter() - start
        row["seconds"] = seconds
        return row

    def _training(self, window: int, texts: tuple[str, ...], missing: Sequence[Trial]) -> Tensor:
        """The windows that every missing trial of this kind takes from, so that their dense states are made once."""
        recipes = [trial.recipe for trial in missing if trial.recipe is not None and trial.texts == texts]
        return self.pools[texts, window][: max(recipe.windows for recipe in recipes if recipe.window == window)]

    def _adjusted(
        self, trial: Trial, fitted: Fitted, windows: Tensor, alphas: Mapping[str, Tensor] | None = None
    ) -> Fitted:
        """The method with the dense prefix of a trial, and with thresholds at its target under these alphas."""
        fitted = fitted.with_dense_prefix(trial.dense_prefix)
        return self.matched(fitted, windows, trial.sparsity, alphas) if trial.matched else fitted


def plan(trials: Sequence[Trial]) -> list[Trial]:
    """The trials and the masks alone of each, every one once; those of one mix of texts together."""
    every = dict.fromkeys(part for trial in trials for part in (trial.masks, trial))
    mixes = list(dict.fromkeys(trial.texts for trial in every))
    return sorted(every, key=lambda trial: mixes.index(trial.texts))


def describe(trial: Trial) -> str:
    """A trial in a few words, for progress bars."""
    what = f"{trial.sparsity:.0%}{' matched' * trial.matched}, {' + '.join(trial.texts)}"
    what += f", first {trial.dense_prefix} dense" * bool(trial.dense_prefix)
    if trial.recipe is None:
        return f"{what}: masks alone"
    recipe = trial.recipe
    words = [f"alpha on {len(trial.carriers)}", f"{recipe.windows} windows of {recipe.window}"]
    words += [f"rate {recipe.learning_rate:g}"] + [f"decay {recipe.weight_decay:g}"] * bool(recipe.weight_decay)
    words += [f"{name.replace('_', ' ')} {value:g}" for name, value in recipe.loss_options.items()]
    return f"{what}: {', '.join(words)}"
