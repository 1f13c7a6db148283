# SPDX-License-Identifier: Apache-2.0
"""Dense, TEAL and SPON on quantized bases (figure 5 of the paper): does an adapter work on weights of fewer bits?"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.adapter.directory import read_adapter, write_adapter
from spon_plugin.decoder.sites import find_sites
from spon_plugin.errors import SponError
from spon_plugin.progress import Progress, no_progress
from spon_plugin.studies.ablation import Trial, describe
from spon_plugin.studies.bench import Bench
from spon_plugin.studies.evaluation import ALL, evaluate_variants, share_recovered
from spon_plugin.studies.rows import RowStore
from spon_plugin.studies.tables import markdown_table, number

FULL, OWN = "full", "own"
NOTES = (
    "Thresholds and alphas from the full-precision base (the first row), or from the base they run on. int8, int4: "
    "bitsandbytes' LLM.int8() and NF4 for the linears of the decoder blocks; torchao-int8, torchao-int4: torchao's "
    "weight-only integers, symmetric, a scale per output and per 32 inputs; the rest in the precision of the first "
    "row. `recovered`: (TEAL - SPON) / (TEAL - dense) at that precision."
)


@dataclass(kw_only=True)
class QuantizedBases:
    """What the rows of the study have in common.

    Attributes:
        load: gives the model at a precision.
        weight_bytes: of such a model.
        precisions: the full one first.
        trial: how thresholds and alphas are trained, by TEAL.
        pool: token ids ``[count, length]`` to calibrate and train on.
        tests: name -> token ids ``[count, length]`` to evaluate on.
        directory: where adapters are kept.
        adapter: takes the place of the one trained on the full-precision base.
        base_model: as in `Bench`.
        protocol: likewise.
        seed: likewise.
        stage: likewise.
        done: likewise.
    """

    load: Callable[[str], nn.Module]
    weight_bytes: Callable[[nn.Module], int]
    precisions: Sequence[str]
    trial: Trial
    pool: Tensor
    tests: Mapping[str, Tensor]
    directory: Path
    adapter: Adapter | None = None
    base_model: str | None = None
    protocol: str = ALL
    seed: int = 0
    stage: Callable[[str], Progress] = lambda _name: no_progress
    done: Callable[[dict[str, Any], bool], None] = lambda _row, _old: None

    @property
    def _key(self) -> str:
        """What the rows depend on beside their precision and the settings of the store."""
        given = None if self.adapter is None else self.adapter.digest
        parts = json.dumps([self.precisions[0], given, self.trial.as_dict()], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()[:12]

    def run(self, store: RowStore) -> list[dict[str, Any]]:
        """Measure every row that `store` does not have, loading one model at a time."""
        rows = []
        for precision in self.precisions:
            origins = [FULL] if precision == self.precisions[0] else [FULL, OWN]
            loaded = cache(partial(self._bench, precision))  # at the first row that is missing, if any
            for origin in origins:
                name = f"precision-{precision}-{origin}-{self._key}"
                rows.append(store.kept(name, partial(self._measure, name, loaded, precision, origin), self.done))
            del loaded
            gc.collect()
        return rows

    def _bench(self, precision: str) -> Bench:
        self.stage(f"{precision}: loading")(0, 1)
        model = self.load(precision)
        stage = lambda name: self.stage(f"{precision}: {name}")  # noqa: E731
        return Bench(
            model=model, sites=find_sites(model), tests=self.tests, protocol=self.protocol, seed=self.seed, stage=stage,
            base_model=self.base_model,
        )  # fmt: skip

    def _measure(self, name: str, loaded: Callable[[], Bench], precision: str, origin: str) -> dict[str, Any]:
        bench = loaded()
        start = time.perf_counter()
        adapter = self._adapter(bench, precision if origin == OWN else self.precisions[0], precision)
        seconds = {"training": time.perf_counter() - start}
        start = time.perf_counter()
        tests = {}
        for test, windows in self.tests.items():
            progress = bench.stage(f"{origin} adapter: evaluating")
            result = evaluate_variants(bench.model, adapter, windows, self.protocol, progress=progress)
            tests[test] = {
                **result.perplexity,
                "masked": result.sparsity["achieved"],
                "tokens": result.tokens,
                "window": result.window,
            }
        seconds["evaluation"] = time.perf_counter() - start
        return {
            "name": name,
            "precision": precision,
            "adapter": origin,
            "weight_bytes": self.weight_bytes(bench.model),
            "tests": tests,
            "seconds": seconds,
        }

    def _adapter(self, bench: Bench, trained_on: str, precision: str) -> Adapter:
        """The adapter that was trained on a precision; trained now if the bench has it."""
        if trained_on == self.precisions[0] and self.adapter is not None:
            return self.adapter
        kept = self.directory / f"adapter-{trained_on}-{self._key}"
        if kept.is_dir():
            return read_adapter(kept)
        if trained_on != precision:  # rows are there, the adapter is gone
            raise SponError.of("output", str(kept), "the adapter of the first row", "Choose another --output.")
        recipe = self.trial.recipe
        assert recipe is not None
        windows = self.pool[: self.trial.calibration_windows(self.pool.shape[1])]
        fitted, _ = bench.fit("teal", windows, self.trial.sparsity)
        teacher = bench.dense_states(self.pool[: recipe.windows])
        alphas, _ = bench.train(fitted, teacher, recipe, "all", describe(self.trial))
        adapter = bench.adapter(fitted, alphas)
        write_adapter(adapter, kept)
        return adapter


def check_adapter(adapter: Adapter, inputs: Mapping[str, int], model: str, sparsity: float, digest: str = "") -> None:
    """Raise `SponError` unless an adapter fits the model, carries alphas and has the target of the study's own.

    Args:
        adapter: to take the place of one trained on the full-precision base.
        inputs: module path -> in_features of the model's linears.
        model: its name.
        sparsity: the study's.
        digest: of the model's weights, see `Adapter.check_base`.
    """
    adapter.check_masks_alone("the study")
    adapter.check_base(inputs, model, digest)
    if not adapter.has_alpha:
        raise SponError.of("adapter", "one without alphas", "a trained one", "spon train it first.")
    if adapter.fields.sparsity != sparsity:
        raise SponError.of("sparsity", sparsity, f"{adapter.fields.sparsity}, the adapter's")


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines."""
    head = ["weights", "MB", "adapter from"]
    for test in rows[0]["tests"]:
        head += [f"{test}: dense", "TEAL", "SPON", "recovered"]
    body = []
    for row in rows:
        line = [row["precision"], f"{row['weight_bytes'] / 1e6:.0f}", row["adapter"]]
        for result in row["tests"].values():
            dense, teal, spon = (result[name] for name in ("dense", "teal", "spon"))
            share = share_recovered(dense, teal, spon)
            line += [number(dense), number(teal), number(spon), "" if share is None else f"{share:.2f}"]
        body.append(line)
    return head, body


def records(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One flat record per row and test text."""
    return [
        {
            "study": "precision",
            **{name: row[name] for name in ("precision", "adapter", "weight_bytes")},
            "test": test,
            **result,
            "recovered": share_recovered(result["dense"], result["teal"], result["spon"]),
        }
        for row in rows
        for test, result in row["tests"].items()
    ]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The study as a Markdown table under its title."""
    head, body = table(rows)
    first = next(iter(rows[0]["tests"].values()))
    protocol = f"Windows of {first['window']} tokens, {first['tokens']} tokens of each text."
    return "\n".join(["## Quantized bases", "", *markdown_table(head, body), "", f"{protocol} {NOTES}", ""])
