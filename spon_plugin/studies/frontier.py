# SPDX-License-Identifier: Apache-2.0
"""Bits against sparsity against recovery: what a model is worth for the bytes that a token reads of it.

Every row is one model: its weights in some format, some share of their rows skipped, with alphas or without. Masks and
alphas are made on the full-precision model, once for a sparsity, and run on every format, as an adapter does that is
merged into a quantized base; what is skipped is measured in each. All rows are compared with the full-precision model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.adapter.directory import read_adapter, write_adapter
from spon_plugin.decoder.masked_linears import MaskedLinears
from spon_plugin.decoder.sites import find_sites
from spon_plugin.errors import SponError
from spon_plugin.masking import check_sparsity
from spon_plugin.progress import Progress, no_progress
from spon_plugin.studies.bench import Bench
from spon_plugin.studies.comparison import OFF, ON
from spon_plugin.studies.evaluation import ALL, Measurement, evaluate
from spon_plugin.studies.last_word import Passage, last_words
from spon_plugin.studies.quality import Reference
from spon_plugin.studies.rows import RowStore
from spon_plugin.studies.token_bytes import Stored
from spon_plugin.training.loop import loss_ends
from spon_plugin.training.recipe import Recipe

# Half a minute to a few minutes for each sparsity with SmolLM2-135M on two cores; `spon train` trains seven times as
# long.
QUICK = Recipe(windows=40, window=256, batch_size=2, epochs=1, learning_rate=0.015)


@dataclass(frozen=True)
class Key:
    """Which row.

    Attributes:
        format: of the weights.
        sparsity: the target; 0 for the dense model.
        alpha: ``off`` or ``on``.
        adapter: name of the adapter that was given for it; empty where the study makes its own.
        digest: of that adapter.
    """

    format: str
    sparsity: float = 0.0
    alpha: str = OFF
    adapter: str = ""
    digest: str = ""

    @property
    def is_made(self) -> bool:
        """Whether the study makes an adapter for it."""
        return bool(self.sparsity) and not self.adapter

    @property
    def name(self) -> str:
        """Of the row's file."""
        if self.adapter:
            return f"{self.format}-{self.adapter}-{self.digest[:8]}"
        return f"{self.format}-{100 * self.sparsity:g}-{self.alpha}"


def keys(
    formats: Sequence[str],
    sparsities: Sequence[float],
    alphas: Sequence[str],
    is_masked: Callable[[str], bool],
    adapters: Mapping[str, Adapter] | None = None,
) -> list[Key]:
    """Every row, in the order in which they are measured: one format after another.

    Args:
        formats: names of formats.
        sparsities: shares, 0 among them for the dense model.
        alphas: ``off``, ``on`` or both; the dense model has none.
        is_masked: whether weights in a format can skip rows; those that cannot have a dense row alone.
        adapters: name -> an adapter that was made before, to be measured in every format, too.

    Raises:
        SponError: a list is empty, a sparsity lies outside [0, 1), or there is no such alpha.
    """
    for field_name, values in (("formats", formats), ("sparsity", sparsities), ("alpha", alphas)):
        if not values:
            raise SponError.of(field_name, "nothing", "at least one")
    for alpha in alphas:
        if alpha not in (OFF, ON):
            raise SponError.of("alpha", alpha, f"{OFF} or {ON}")
    found = []
    for name in formats:
        for sparsity in sorted(check_sparsity(share) for share in sparsities):
            if not sparsity or not is_masked(name):
                found.append(Key(name))
            else:
                found += [Key(name, sparsity, alpha) for alpha in alphas]
        for given, adapter in (adapters or {}).items() if is_masked(name) else ():
            alpha = ON if adapter.has_alpha else OFF
            found.append(Key(name, adapter.fields.sparsity, alpha, given, adapter.digest))
    return list(dict.fromkeys(found))


@dataclass(kw_only=True)
class Frontier:
    """What all rows have in common.

    Attributes:
        load: gives the model in a format, made for an adapter or for none.
        is_fit: whether weights in a format depend on the adapter that they run under.
        full: the format that the others are compared with, and on which masks and alphas are made.
        tests: name -> token ids ``[count, length]`` to evaluate on.
        calibration: token ids ``[count, length]``.
        training: token ids ``[count, length]`` to train alphas on.
        directory: where adapters are kept.
        adapters: name -> an adapter that was given; those of the keys.
        passages: whose last words are to be guessed.
        method: name of a sparsifier with thresholds.
        recipe: the schedule of the alphas.
        base_model: as in `Bench`.
        protocol: as in `Bench`.
        seed: likewise.
        stage: likewise.
        done: likewise.
    """

    load: Callable[[str, Adapter | None], Stored]
    full: str
    tests: Mapping[str, Tensor]
    calibration: Tensor
    training: Tensor
    directory: Path
    is_fit: Callable[[str], bool] = lambda _format: False
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    passages: Sequence[Passage] = ()
    method: str = "teal"
    recipe: Recipe = QUICK
    base_model: str | None = None
    protocol: str = ALL
    seed: int = 0
    stage: Callable[[str], Progress] = lambda _name: no_progress
    done: Callable[[dict[str, Any], bool], None] = lambda _row, _old: None
    _references: dict[str, Reference] = field(default_factory=dict, init=False)
    _loaded: tuple[tuple[str, str], Stored] | None = field(default=None, init=False)

    def run(self, wanted: Sequence[Key], store: RowStore) -> list[dict[str, Any]]:
        """Measure every row that `store` does not have, one format in memory at a time.

        Returns:
            The wanted rows, in order.

        Raises:
            SponError: there is less text than the recipe takes.
        """
        least = max(self.recipe.batch_size, self.recipe.windows)
        if any(key.alpha == ON and not key.adapter for key in wanted) and len(self.training) < least:
            remedy = "Use more text, or fewer windows, but not fewer than a step's."
            raise SponError.of("training windows", len(self.training), f"at least {least}", remedy)
        missing = [key for key in wanted if not store.has(key.name)]
        if missing:
            self._prepare(missing)
        rows = [store.kept(key.name, partial(self._measure, key), self.done) for key in wanted]
        self._loaded = None
        return rows

    def _prepare(self, missing: Sequence[Key]) -> None:
        """Make of the full-precision model what all rows need of it."""
        model = self._stored(self.full).model
        bench = Bench(
            model=model, sites=find_sites(model), tests=self.tests, protocol=self.protocol, seed=self.seed,
            stage=self.stage, base_model=self.base_model,
        )  # fmt: skip
        self._references = {name: bench.reference(name) for name in self.tests}
        for sparsity, alpha in dict.fromkeys((key.sparsity, key.alpha) for key in missing if key.is_made):
            if not self._adapter_directory(sparsity, alpha).is_dir():
                write_adapter(self._made(bench, sparsity, alpha), self._adapter_directory(sparsity, alpha))

    def _made(self, bench: Bench, sparsity: float, alpha: str) -> Adapter:
        """Masks that meet the target in the sparse model, with alphas or without."""
        start = time.perf_counter()
        fitted, _ = bench.fit(self.method, self.calibration, sparsity)
        self.stage(f"{sparsity:.0%}: matching thresholds")(0, 1)
        fitted = bench.matched(fitted, self.calibration, sparsity)
        alphas: dict[str, Tensor] = {}
        made: dict[str, Any] = {}
        if alpha == ON:
            teacher = bench.dense_states(self.training)
            alphas, losses = bench.train(fitted, teacher, self.recipe, "all", f"{sparsity:.0%}")
            made = {"loss": loss_ends(losses)}
            fitted = bench.matched(fitted, self.calibration, sparsity, alphas)
        adapter = bench.adapter(fitted, alphas)
        adapter.fields.calibration |= {**made, "seconds": round(time.perf_counter() - start, 1)}
        return adapter

    def _adapter(self, key: Key) -> Adapter | None:
        if key.adapter:
            return self.adapters[key.adapter]
        return read_adapter(self._adapter_directory(key.sparsity, key.alpha)) if key.sparsity else None

    def _adapter_directory(self, sparsity: float, alpha: str) -> Path:
        return self.directory / f"adapter-{100 * sparsity:g}-{alpha}"

    def _stored(self, format: str, adapter: Adapter | None = None) -> Stored:
        wanted = format, "" if adapter is None else adapter.digest
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None  # before the next one is loaded
            self.stage(f"{format}: loading")(0, 1)
            self._loaded = wanted, self.load(format, adapter)
        return self._loaded[1]

    def _measure(self, key: Key) -> dict[str, Any]:
        adapter, start = self._adapter(key), time.perf_counter()
        stored = self._stored(key.format, adapter if self.is_fit(key.format) else None)
        loading, start = time.perf_counter() - start, time.perf_counter()
        masks = {} if adapter is None else adapter.masks
        method = None if adapter is None else MaskedLinears.of(stored.model, masks, adapter.fields.dense_prefix)
        added = {} if method is None else {"alphas": method.alphas}
        label = f"{key.format} {key.sparsity:.0%}, {key.adapter or 'alpha ' + key.alpha}"
        texts: dict[str, Measurement] = {}
        for name, windows in self.tests.items():
            given: dict[str, Any] = {
                "reference": self._references[name],
                "progress": self.stage(f"{label}: evaluating"),
                **added,
            }
            texts[name] = evaluate(stored.model, method, windows, self.protocol, **given)
        reads = {name: stored.bytes.read(found.per_module, masks) for name, found in texts.items()}
        read = sum(reads.values()) / len(reads)
        row = {
            "format": key.format,
            "sparsity": key.sparsity,
            "alpha": key.alpha,
            "adapter": key.adapter,
            "bits_per_weight": stored.bytes.bits(read),
            "bytes_per_token": read,
            "bytes_dense": stored.bytes.read(),
            "texts": {name: found.figures() for name, found in texts.items()},
        }
        if self.passages:
            row["last_word"] = self._last_words(stored.model, method, label).figures()
        seconds = {"loading": loading, "evaluation": time.perf_counter() - start}
        if adapter is not None and key.is_made:
            seconds["adapter"] = adapter.fields.calibration["seconds"]
        return {**row, "seconds": seconds}

    def _last_words(self, model: Any, method: MaskedLinears | None, label: str) -> Any:
        progress = self.stage(f"{label}: last words")
        if method is None:
            return last_words(model, self.passages, progress=progress)
        with method.attach(model, method.alphas):
            return last_words(model, self.passages, progress=progress)
