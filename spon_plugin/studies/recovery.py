# SPDX-License-Identifier: Apache-2.0
"""How much of uniform TEAL's gap comes back, at equal bytes read, by every step that is known to help.

Several processes may measure the rows of one directory at once: each takes what nobody has or is at.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spon_plugin.adapter.directory import write_adapter
from spon_plugin.decoder.attachment import SparseMethod
from spon_plugin.errors import SponError
from spon_plugin.sparsifiers.match import match_method
from spon_plugin.sparsifiers.thresholds import ThresholdFitted
from spon_plugin.studies.ablation import DENSE
from spon_plugin.studies.bench import Bench
from spon_plugin.studies.recovery_plan import Row
from spon_plugin.studies.rows import RowStore
from spon_plugin.training.deltas import RATE, Deltas
from spon_plugin.training.extension import Extended
from spon_plugin.training.loop import Losses, Match, Trained, distil, loss_ends
from spon_plugin.training.recipe import Recipe

POOL_TOKENS = 1 << 20
"""The dense model's states of these are kept, 4 bytes times the hidden size each; more steps read them again."""
_CURVE = 40  # points that are kept of a row's losses


@dataclass(kw_only=True)
class Recovery(Bench):
    """What the rows have in common.

    Attributes:
        windows: from how many of the training texts (None for all), tokens per window and a count to token ids.
        calibration: token ids ``[count, length]`` that thresholds come from and are matched on.
    """

    windows: Callable[[int | None, int, int], Tensor]
    calibration: Tensor

    def run(self, rows: Sequence[Row], store: RowStore) -> list[str]:
        """Measure the rows that `store` does not have and no other process is at, with the dense model.

        Returns:
            The names of those that could not be measured, of which there is a warning each.
        """
        failed = []
        store.taken(DENSE, lambda: {"name": DENSE, "label": DENSE, "tests": self.evaluate(None, DENSE)}, self.done)
        for row in rows:
            try:
                store.taken(row.name, partial(self.measure, row, store), self.done)
            except (SponError, RuntimeError) as error:  # such as memory that others have: the row stays missing
                warnings.warn(f"{row.name}: {error}", stacklevel=2)
                failed.append(row.name)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        return failed

    def measure(self, row: Row, store: RowStore) -> dict[str, Any]:
        """One row; its adapter, where the format can hold it and it is for the given model, lies beside the rows."""
        start = time.perf_counter()
        fitted, _ = self.fit(row.method, self.calibration, row.sparsity)
        assert isinstance(fitted, ThresholdFitted)
        target = row.sparsity + row.extension.extra_reads(self.sites) / sum(fitted.weights.values())
        match = partial(self._match, target)
        method = match(self._method(row, fitted), {})
        seconds = {"calibration": time.perf_counter() - start}
        found: dict[str, Any] = {"name": row.name, **row.as_dict(), "target": target}
        trained = Trained({}, [], method)
        if row.recipe is not None:
            trained = self._train(row, row.recipe, method, fitted, match, seconds)
            found |= _training(row.recipe, trained.losses)
        with self._merged(trained.method):
            start, alphas = time.perf_counter(), trained.alphas
            method = trained.method if row.recipe is None else match(_alone(trained.method), alphas)
            seconds["matching"], start = time.perf_counter() - start, time.perf_counter()
            found["tests"] = self.evaluate(method, row.name, alphas=alphas)
            if row.deltas:
                found["unmasked"] = self.evaluate(None, row.name)
        seconds["evaluation"] = time.perf_counter() - start
        found |= {"seconds": seconds, "extra_bytes": fitted.extra_bytes(self.model, list(alphas))}
        if not row.deltas:
            self._keep(row, method, alphas, store)
        return found

    def _method(self, row: Row, fitted: ThresholdFitted) -> Any:
        """What is trained beside alphas, around the masks."""
        if row.deltas:
            return Deltas(fitted, self.model, row.deltas, RATE, row.seed)
        return Extended(fitted, self.model, self.sites, row.extension, row.seed) if row.extension else fitted

    def _match(self, target: float, method: Any, alphas: Mapping[str, Tensor]) -> Any:
        return match_method(self.model, method, self.calibration, target, alphas, self.batch_size)

    def _train(
        self,
        row: Row,
        recipe: Recipe,
        method: Any,
        fitted: ThresholdFitted,
        match: Match,
        seconds: dict[str, float],
    ) -> Trained:
        """Train a row, and note how long it takes."""
        start = time.perf_counter()
        windows = self.windows(row.texts, recipe.window, _pool(recipe))
        with tensor_cores():
            teacher = self.dense_states(windows, recipe.objective)
            seconds["dense states"], start = time.perf_counter() - start, time.perf_counter()
            progress = self.stage(f"{row.name}: training")
            trained = distil(self.model, method, fitted, teacher, recipe, "all", row.seed, progress, match)
        seconds["training"] = time.perf_counter() - start
        return trained

    @contextmanager
    def _merged(self, method: Any) -> Iterator[None]:
        """While the block runs, the model has the weights that were tuned, if any were."""
        if not isinstance(method, Deltas):
            yield
            return
        for test in self.tests:
            self.reference(test)  # the dense model's, while it is that
        with method.merged(self.model):
            yield

    def _keep(self, row: Row, method: SparseMethod, alphas: Mapping[str, Tensor], store: RowStore) -> None:
        fitted = method.fitted() if isinstance(method, Extended) else method
        directory = store.directory / "adapters" / row.name
        if isinstance(fitted, ThresholdFitted) and not directory.exists():
            write_adapter(self.adapter(fitted, alphas), directory)


def _alone(method: Any) -> Any:
    """The method on merged weights."""
    return method.base if isinstance(method, Deltas) else method


def _training(recipe: Recipe, losses: Losses) -> dict[str, Any]:
    """What a row says of its training."""
    width = max(1, len(losses) // _CURVE)
    points = [losses[at : at + width] for at in range(0, len(losses), width)]
    return {
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.batch_size * recipe.window,
        "loss": loss_ends(losses),
        "loss_curve": [sum(step["loss"] for step in part) / len(part) for part in points],
    }


def _pool(recipe: Recipe) -> int:
    """How many windows are drawn from: as many as are read, or a pool that the rows of many steps share."""
    most = max(1, POOL_TOKENS // recipe.window)
    return most if 2 * recipe.windows > most else recipe.windows


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Products in TF32 where there is any, while the block runs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
