# SPDX-License-Identifier: Apache-2.0
"""Trials that differ in one thing: where alpha is, how long it trained and on what, how sparse the model is."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from spon_plugin.decoder.sites import Site
from spon_plugin.errors import SponError
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers import SPARSIFIERS, Fitted, Sparsifier, Statistics, get_sparsifier
from spon_plugin.studies.evaluation import evaluate_fitted
from spon_plugin.studies.rows import RowStore
from spon_plugin.training.loop import Teacher, loss_ends, train_alphas
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
    """

    sparsity: float
    texts: tuple[str, ...]
    calibration_tokens: int
    carriers: tuple[str, ...] = ()
    recipe: Recipe | None = None

    @property
    def masks(self) -> Trial:
        """The same without alpha: what a share of the gap is measured against."""
        return replace(self, carriers=(), recipe=None)

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
        }


@dataclass
class Ablation:
    """What all trials have in common.

    Attributes:
        model: the dense model.
        sites: from `find_sites`.
        pools: what trials take from, from the start, so that fewer tokens are part of more.
        window: tokens per window to calibrate on; a trial trains on windows of its recipe.
        tests: name -> token ids ``[count, length]`` to evaluate on.
        method: name of a sparsifier.
        protocol: see `evaluation.dense_prefix_of`.
        seed: of the order of the training windows.
        stage: gives the progress callback of each piece of work by its name.
        done: called with every row when it is there, and whether it had been before.
    """

    model: nn.Module
    sites: list[Site]
    pools: Pools
    window: int
    tests: Mapping[str, Tensor]
    method: str = "teal"
    protocol: str = "all-but-first"
    seed: int = 0
    stage: Callable[[str], Progress] = lambda _name: no_progress
    done: Callable[[dict[str, Any], bool], None] = lambda _row, _old: None
    _statistics: dict[tuple[tuple[str, ...], int], Statistics] = field(default_factory=dict, init=False)
    _teacher: tuple[tuple[tuple[str, ...], int], Teacher] | None = field(default=None, init=False)

    def check(self, trials: Sequence[Trial]) -> None:
        """Check what a run needs.

        Raises:
            SponError: there is no such method, or it does not cover every linear at every sparsity; a trial has fewer
                windows than a step takes; or a text is shorter than a trial needs.
        """
        if not get_sparsifier(self.method).universal:
            every = ", ".join(name for name, cls in SPARSIFIERS.items() if cls.universal)
            raise SponError.of("method", self.method, f"one that covers every linear at every sparsity: {every}")
        for trial in trials:
            if trial.recipe is not None and trial.recipe.windows < trial.recipe.batch_size:
                raise SponError.of("windows", trial.recipe.windows, f"at least {trial.recipe.batch_size}, one step's")
            needs = [(self.window, self._calibration_windows(trial))]
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
        rows = {DENSE: store.kept(DENSE, lambda: {"name": DENSE, "tests": self._evaluate("dense", None)}, self.done)}
        missing = [trial for trial in wanted if not store.has(trial.name)]
        for trial in wanted:
            rows[trial.name] = store.kept(trial.name, partial(self._measure, trial, missing), self.done)
        return rows

    def _measure(self, trial: Trial, missing: Sequence[Trial]) -> dict[str, Any]:
        label = describe(trial)
        fitted, seconds = self.fit(trial)
        row: dict[str, Any] = {"name": trial.name, **trial.as_dict()}
        added: dict[str, Any] = {}
        if trial.recipe is not None:
            start = time.perf_counter()
            teacher = self._dense_states(trial.texts, trial.recipe.window, missing).first(trial.recipe.windows)
            row["training_tokens"] = int(teacher.windows.numel())
            seconds["dense states"] = time.perf_counter() - start
            start = time.perf_counter()
            progress = self.stage(f"{label}: training")
            alphas, losses = train_alphas(
                self.model, fitted, teacher, trial.recipe, list(trial.carriers), self.seed, progress
            )
            seconds["training"] = time.perf_counter() - start
            row["loss"] = loss_ends(losses)
            added = {"alphas": alphas}
        start = time.perf_counter()
        row["tests"] = self._evaluate(f"{label}: evaluating", fitted, added)
        seconds["evaluation"] = time.perf_counter() - start
        row["seconds"] = seconds
        return row

    def fit(self, trial: Trial) -> tuple[Fitted, dict[str, float]]:
        """The method as the trial has it, and the seconds that each part took."""
        sparsifier: Sparsifier = get_sparsifier(self.method)
        key = (trial.texts, trial.calibration_tokens)
        start = time.perf_counter()
        if key not in self._statistics:
            windows = self.pools[trial.texts, self.window][: self._calibration_windows(trial)]
            progress = self.stage(f"{sparsifier.name}: calibrating")
            self._statistics[key] = sparsifier.calibrate(self.model, self.sites, windows, progress=progress)
        fitted = sparsifier.at(self.model, self._statistics[key], trial.sparsity)
        return fitted, {"calibration": time.perf_counter() - start}

    def _dense_states(self, texts: tuple[str, ...], window: int, missing: Sequence[Trial]) -> Teacher:
        """The dense model's states on the windows of every missing trial of this kind, made once."""
        if self._teacher is None or self._teacher[0] != (texts, window):
            recipes = [trial.recipe for trial in missing if trial.recipe is not None and trial.texts == texts]
            most = max(recipe.windows for recipe in recipes if recipe.window == window)
            progress = self.stage("Dense model on the training text")
            self._teacher = ((texts, window), Teacher(self.model, self.pools[texts, window][:most], progress=progress))
        return self._teacher[1]

    def _calibration_windows(self, trial: Trial) -> int:
        return max(1, trial.calibration_tokens // self.window)

    def _evaluate(
        self, label: str, fitted: Fitted | None, added: Mapping[str, Any] | None = None
    ) -> dict[str, dict[str, Any]]:
        return {
            name: evaluate_fitted(self.model, fitted, windows, self.protocol, self.stage(label), **(added or {}))
            for name, windows in self.tests.items()
        }


def plan(trials: Sequence[Trial]) -> list[Trial]:
    """The trials and the masks alone of each, every one once; those of one mix of texts together."""
    every = dict.fromkeys(part for trial in trials for part in (trial.masks, trial))
    mixes = list(dict.fromkeys(trial.texts for trial in every))
    return sorted(every, key=lambda trial: mixes.index(trial.texts))


def describe(trial: Trial) -> str:
    """A trial in a few words, for progress bars."""
    what = f"{trial.sparsity:.0%}, {' + '.join(trial.texts)}"
    if trial.recipe is None:
        return f"{what}: masks alone"
    recipe = trial.recipe
    words = [f"alpha on {len(trial.carriers)}", f"{recipe.windows} windows of {recipe.window}"]
    words += [f"rate {recipe.learning_rate:g}"] + [f"decay {recipe.weight_decay:g}"] * bool(recipe.weight_decay)
    return f"{what}: {', '.join(words)}"
