# SPDX-License-Identifier: Apache-2.0
"""Sparsification methods side by side, with and without alpha, under one protocol: the paper's table 1."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from spon_plugin.decoder.sites import decoder_blocks
from spon_plugin.errors import SponError
from spon_plugin.masking import check_sparsity
from spon_plugin.sparsifiers import Fitted, get_sparsifier
from spon_plugin.sparsifiers.mean_bias import mean_biases
from spon_plugin.studies.bench import Bench
from spon_plugin.studies.rows import RowStore
from spon_plugin.training.loop import loss_ends
from spon_plugin.training.recipe import Recipe

OFF, MEAN, ON = "off", "mean", "on"
DENSE = "dense"
MEAN_TOKENS = 4096

# The default of `spon compare`: a minute a row for SmolLM2-135M on two cores, so rows are to be compared with each
# other; `spon train` trains seven times as long.
QUICK = Recipe(windows=40, window=256, batch_size=2, epochs=1, learning_rate=0.015)


@dataclass(frozen=True)
class Key:
    """Which row.

    Attributes:
        method: name of a sparsifier.
        sparsity: the target.
        alpha: ``off``; ``mean``, the bias measured without training; ``on``, trained for every linear that the method
            covers; or the name of the linears that carry a trained alpha, such as ``down_proj``.
    """

    method: str
    sparsity: float
    alpha: str

    @property
    def name(self) -> str:
        """Of the row's file."""
        return f"{self.method}-{100 * self.sparsity:g}-{self.alpha}"


def keys(methods: Sequence[str], sparsities: Sequence[float], alphas: Sequence[str]) -> list[Key]:
    """Every row of a table, in the order in which they are measured.

    Raises:
        SponError: a list is empty, a method is unknown, or a sparsity lies outside [0, 1).
    """
    for field_name, values in (("methods", methods), ("sparsity", sparsities), ("alpha", alphas)):
        if not values:
            raise SponError.of(field_name, "nothing", "at least one")
    names = [get_sparsifier(method).name for method in methods]
    shares = [check_sparsity(sparsity) for sparsity in sparsities]
    return list(dict.fromkeys(Key(m, s, a) for m in names for s in shares for a in alphas))


@dataclass(kw_only=True)
class Comparison(Bench):
    """A table of methods.

    Attributes:
        calibration: token ids ``[count, length]`` to calibrate on.
        training: token ids ``[count, length]`` to train alphas on.
        recipe: the schedule of every trained row.
    """

    calibration: Tensor
    training: Tensor
    recipe: Recipe = QUICK

    def run(self, wanted: Sequence[Key], store: RowStore) -> list[dict[str, Any]]:
        """Measure every row that `store` does not have, the dense one first.

        A row that a method cannot give (a sparsity beyond its reach, a model it does not fit) says so in ``skipped``
        and the run goes on.

        Returns:
            The dense row and the wanted ones, in order.

        Raises:
            SponError: an alpha names no linear, or there is less text than the recipe takes; before any work.
        """
        self.check(wanted)
        rows = [store.kept(DENSE, self._dense, self.done)]
        for method in dict.fromkeys(key.method for key in wanted):
            mine = [key for key in wanted if key.method == method]
            rows += [store.kept(key.name, partial(self._measure, key), self.done) for key in mine]
        return rows

    def check(self, wanted: Sequence[Key]) -> None:
        """Raise `SponError` for an alpha that names no linear, and for less text than the recipe takes."""
        leaves = sorted({path.rpartition(".")[2] for site in self.sites for path in site.modules})
        trained = [key.alpha for key in wanted if key.alpha not in (OFF, MEAN)]
        for alpha in trained:
            if alpha != ON and alpha not in leaves:
                raise SponError.of("alpha", alpha, f"{OFF}, {MEAN}, {ON}, or one of {', '.join(leaves)}")
        least = max(self.recipe.batch_size, self.recipe.windows)
        if trained and len(self.training) < least:
            remedy = "Use more text, or fewer windows, but not fewer than a step's."
            raise SponError.of("training windows", len(self.training), f"at least {least}", remedy)

    def _dense(self) -> dict[str, Any]:
        return {"method": DENSE, "texts": self.evaluate(None, DENSE), **self.last_words(None, DENSE)}

    def _measure(self, key: Key) -> dict[str, Any]:
        row: dict[str, Any] = {"method": key.method, "sparsity": key.sparsity, "alpha": key.alpha}
        label = f"{key.method} {key.sparsity:.0%}"
        try:
            fitted, calibrating = self.fit(key.method, self.calibration, key.sparsity)
            start = time.perf_counter()
            added, losses = self._added(fitted, key.alpha, label)
        except SponError as error:
            return {**row, "skipped": str(error)}
        seconds = {"calibration": calibrating}
        if key.alpha != OFF:
            seconds["mean" if key.alpha == MEAN else "training"] = time.perf_counter() - start
        start = time.perf_counter()
        row["texts"] = self.evaluate(fitted, f"{label}, alpha {key.alpha}", **added)
        row |= self.last_words(fitted, f"{label}, alpha {key.alpha}", **added)
        seconds["evaluation"] = time.perf_counter() - start
        blocks = len(decoder_blocks(self.model))
        carriers = {path for vectors in added.values() for path in vectors}
        row["extra_bytes_per_layer"] = fitted.extra_bytes(self.model, carriers) / blocks
        row["seconds"] = seconds
        if losses:
            row["loss"] = losses
        return row

    def _added(self, fitted: Fitted, alpha: str, label: str) -> tuple[dict[str, Any], dict[str, float]]:
        """What is attached beside the method, and the ends of the loss curve."""
        if alpha == OFF:
            return {}, {}
        if alpha == MEAN:
            windows = self.calibration[: max(1, MEAN_TOKENS // self.calibration.shape[1])]
            biases = mean_biases(self.model, fitted, windows, progress=self.stage(f"{label}: mean bias"))
            return {"biases": biases}, {}
        modules: str | list[str] = "all" if alpha == ON else [alpha]
        teacher = self.dense_states(self.training)
        alphas, losses = self.train(fitted, teacher, self.recipe, modules, f"{label}, alpha {alpha}")
        return {"alphas": alphas}, loss_ends(losses)


def by_key(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    """The measured rows other than the dense one, with their keys."""
    for row in rows:
        if row["method"] != DENSE and "skipped" not in row:
            yield Key(row["method"], row["sparsity"], row["alpha"]), row
