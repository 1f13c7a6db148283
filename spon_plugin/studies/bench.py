# SPDX-License-Identifier: Apache-2.0
"""What every study does to a model for a row of its table: fit a method, train alphas, evaluate; nothing twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.adapter.base import base_digest
from spon_plugin.calibration.text import windows_digest
from spon_plugin.decoder.attachment import SparseMethod
from spon_plugin.decoder.sites import Site
from spon_plugin.errors import SponError
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers import Fitted, Statistics, get_sparsifier
from spon_plugin.sparsifiers.calibrate import peft_fields
from spon_plugin.sparsifiers.match import match_method
from spon_plugin.sparsifiers.thresholds import ThresholdFitted
from spon_plugin.studies.evaluation import ALL, evaluate
from spon_plugin.studies.last_word import Passage, last_words
from spon_plugin.studies.quality import Reference
from spon_plugin.training.loop import Losses, Teacher, train_alphas
from spon_plugin.training.objective import Objective
from spon_plugin.training.recipe import Recipe


@dataclass(kw_only=True)
class Bench:
    """A model, the texts that rows are evaluated on, and what rows share.

    Attributes:
        model: the dense model.
        sites: from `find_sites`.
        tests: name -> token ids ``[count, length]`` to evaluate on.
        passages: whose last words are to be guessed; see `last_word`.
        base_model: what adapters call the model.
        protocol: see `evaluation.dense_prefix_of`.
        seed: of the order of the training windows.
        batch_size: windows per forward pass, where no gradients are made.
        keep_on_device: whether the dense model's states stay on the model's device while something is trained on them.
        stage: gives the progress callback of each piece of work by its name.
        done: called with every row when it is there, and whether it had been before.
    """

    model: nn.Module
    sites: list[Site]
    tests: Mapping[str, Tensor]
    passages: Sequence[Passage] = ()
    base_model: str | None = None
    protocol: str = ALL
    seed: int = 0
    batch_size: int = 4
    keep_on_device: bool = False
    stage: Callable[[str], Progress] = lambda _name: no_progress
    done: Callable[[dict[str, Any], bool], None] = lambda _row, _old: None
    _statistics: dict[tuple[str, str], tuple[Statistics | SponError, float]] = field(default_factory=dict, init=False)
    _fitted: tuple[tuple[str, str, float], Fitted, float] | None = field(default=None, init=False)
    _teacher: tuple[str, Teacher] | None = field(default=None, init=False)
    _references: dict[str, Reference] = field(default_factory=dict, init=False)

    def fit(self, method: str, windows: Tensor, sparsity: float) -> tuple[Fitted, float]:
        """A method at a sparsity. Each text is read once for each method; the statistics of the last one are kept.

        Args:
            method: name of a sparsifier.
            windows: token ids ``[count, length]`` to calibrate on.
            sparsity: the target.

        Returns:
            The method, and the seconds that calibrating and fitting it take.

        Raises:
            SponError: the method does not fit the model, or cannot reach the target.
        """
        text = windows_digest(windows)
        if self._fitted is None or self._fitted[0] != (method, text, sparsity):
            statistics, reading = self._read(method, text, windows)
            progress = self.stage(f"{method} {sparsity:.0%}: fitting")
            start = time.perf_counter()
            fitted = get_sparsifier(method).at(self.model, statistics, sparsity, progress)
            self._fitted = (method, text, sparsity), fitted, reading + time.perf_counter() - start
        return self._fitted[1], self._fitted[2]

    def _read(self, method: str, text: str, windows: Tensor) -> tuple[Statistics, float]:
        self._statistics = {key: kept for key, kept in self._statistics.items() if key[0] == method}
        if (method, text) not in self._statistics:
            start = time.perf_counter()
            found: Statistics | SponError
            try:
                progress = self.stage(f"{method}: calibrating")
                found = get_sparsifier(method).calibrate(self.model, self.sites, windows, progress=progress)
            except SponError as error:
                found = error
            self._statistics[method, text] = found, time.perf_counter() - start
        found, seconds = self._statistics[method, text]
        if isinstance(found, SponError):
            raise found
        return found, seconds

    def matched(
        self, fitted: Fitted, windows: Tensor, sparsity: float, alphas: Mapping[str, Tensor] | None = None
    ) -> Fitted:
        """The method with its thresholds held at the target in the sparse model itself, under these alphas.

        A method without thresholds is given back as it is.
        """
        if not isinstance(fitted, ThresholdFitted):
            return fitted
        return match_method(self.model, fitted, windows, sparsity, alphas)

    def adapter(self, fitted: Fitted, alphas: Mapping[str, Tensor]) -> Adapter:
        """A method and its alphas as an adapter of the bench's model."""
        adapter = fitted.adapter(alphas, peft=peft_fields(self.model, self.sites, self.base_model))
        adapter.fields.base_digest = base_digest(self.model)
        return adapter

    def dense_states(self, windows: Tensor, objective: Objective | None = None) -> Teacher:
        """The dense model's states on the windows ``[count, length]``, as `objective` wants them; the last are kept."""
        blocks = None if objective is None else objective.block_states(self.model)
        kept = f"{windows_digest(windows)} {0 if blocks is None else len(blocks.blocks)}"
        if self._teacher is None or self._teacher[0] != kept:
            progress = self.stage("Dense model on the training text")
            self._teacher = None  # let go before there is another
            teacher = Teacher(self.model, windows, self.batch_size, progress, blocks, self.keep_on_device)
            self._teacher = kept, teacher
        return self._teacher[1]

    def train(
        self, fitted: Fitted, teacher: Teacher, recipe: Recipe, alpha_modules: str | list[str], label: str
    ) -> tuple[dict[str, Tensor], Losses]:
        """See `train_alphas`; `label` says what is trained."""
        progress = self.stage(f"{label}: training")
        return train_alphas(self.model, fitted, teacher, recipe, alpha_modules, self.seed, progress)

    def evaluate(self, fitted: SparseMethod | None, label: str, **added: Any) -> dict[str, dict[str, Any]]:
        """Test -> figures of `evaluation.evaluate`; the dense model's for None. `label` says what is evaluated.

        They are compared with the dense model's.
        """
        figures = {}
        for name, windows in self.tests.items():
            given = {"reference": self.reference(name), "progress": self.stage(f"{label}: evaluating"), **added}
            figures[name] = evaluate(self.model, fitted, windows, self.protocol, self.batch_size, **given).figures()
        return figures

    def last_words(self, fitted: Fitted | None, label: str, **added: Any) -> dict[str, Any]:
        """``last_word`` of a row: `LastWords.figures`; nothing without passages."""
        if not self.passages:
            return {}
        with nullcontext() if fitted is None else fitted.attach(self.model, **added):
            found = last_words(self.model, self.passages, progress=self.stage(f"{label}: last words"))
        return {"last_word": found.figures()}

    def reference(self, test: str) -> Reference:
        """The dense model on the windows of a test."""
        if test not in self._references:
            progress = self.stage("Dense model on the test text")
            self._references[test] = Reference(self.model, self.tests[test], self.batch_size, progress)
        return self._references[test]
