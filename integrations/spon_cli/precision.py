# SPDX-License-Identifier: Apache-2.0
"""The study `precision` of `spon ablate`: dense, TEAL and SPON on quantized bases, figure 5 of the paper."""

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

from torch import Tensor

from spon_cli.plots import COLORS, figure
from spon_plugin import Adapter, SponError, find_sites, read_adapter, write_adapter
from spon_plugin.progress import Progress
from spon_plugin.studies.ablation import Ablation, Trial
from spon_plugin.studies.evaluation import evaluate, share_recovered
from spon_plugin.studies.rows import RowStore
from spon_plugin.studies.tables import markdown_table, number
from spon_plugin.training.loop import Teacher, train_alphas
from spon_transformers.precision import FLOATS, check_precision, load_precision, weight_bytes

FULL, OWN = "full", "own"
NOTES = (
    "Thresholds and alphas from the full-precision base (the first row), or from the base they run on. int8, int4: "
    "bitsandbytes' LLM.int8() and NF4 for the linears of the decoder blocks; torchao-int8, torchao-int4: torchao's "
    "weight-only integers, symmetric, a scale per output and per 32 inputs; the rest in the precision of the first "
    "row. `recovered`: (TEAL - SPON) / (TEAL - dense) at that precision."
)


@dataclass
class PrecisionStudy:
    """What the rows of the study have in common.

    Attributes:
        model: name of the model.
        precisions: the full one first.
        trial: how thresholds and alphas are trained.
        pool: token ids ``[count, length]`` to calibrate and train on.
        tests: name -> token ids ``[count, length]`` to evaluate on.
        protocol: see `evaluation.dense_prefix_of`.
        seed: of the order of the training windows.
        adapter: takes the place of the one trained on the full-precision base.
        directory: where adapters are kept.
        stage: as in `Ablation`.
        done: likewise.
    """

    model: str
    precisions: Sequence[str]
    trial: Trial
    pool: Tensor
    tests: Mapping[str, Tensor]
    protocol: str
    seed: int
    adapter: Adapter | None
    directory: Path
    stage: Callable[[str], Progress]
    done: Callable[[dict[str, Any], bool], None]

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
            loaded = cache(partial(self._load, precision))  # at the first row that is missing, if any
            for origin in origins:
                name = f"precision-{precision}-{origin}-{self._key}"
                rows.append(store.kept(name, partial(self._measure, name, loaded, precision, origin), self.done))
            del loaded
            gc.collect()
        return rows

    def _load(self, precision: str) -> Any:
        self.stage(f"{precision}: loading")(0, 1)
        return load_precision(self.model, precision, self.precisions[0])

    def _measure(self, name: str, loaded: Callable[[], Any], precision: str, origin: str) -> dict[str, Any]:
        model = loaded()
        sites = find_sites(model)
        start = time.perf_counter()
        adapter = self._adapter(model, sites, precision if origin == OWN else self.precisions[0], precision)
        seconds = {"training": time.perf_counter() - start}
        start = time.perf_counter()
        tests = {}
        for test, windows in self.tests.items():
            progress = self.stage(f"{precision}, {origin} adapter: evaluating")
            result = evaluate(model, adapter, sites, windows, self.protocol, progress=progress)
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
            "weight_bytes": weight_bytes(model),
            "tests": tests,
            "seconds": seconds,
        }

    def _adapter(self, model: Any, sites: list[Any], trained_on: str, precision: str) -> Adapter:
        """The adapter that was trained on a precision; trained now if the model has it."""
        if trained_on == self.precisions[0] and self.adapter is not None:
            return self.adapter
        kept = self.directory / f"adapter-{trained_on}-{self._key}"
        if kept.is_dir():
            return read_adapter(kept)
        if trained_on != precision:  # rows are there, the adapter is gone
            raise SponError.of("output", str(kept), "the adapter of the first row", "Choose another --output.")
        assert self.trial.recipe is not None
        texts, window = self.trial.texts, self.pool.shape[1]
        bench = Ablation(model, sites, {(texts, window): self.pool}, window, {}, seed=self.seed, stage=self.stage)
        fitted, _ = bench.fit(self.trial)
        progress = self.stage(f"{precision}: dense states")
        teacher = Teacher(model, self.pool[: self.trial.recipe.windows], progress=progress)
        progress = self.stage(f"{precision}: training")
        alphas, _ = train_alphas(model, fitted, teacher, self.trial.recipe, "all", self.seed, progress)
        adapter = fitted.adapter(alphas)
        write_adapter(adapter, kept)
        return adapter


def check_precisions(precisions: Sequence[str]) -> None:
    """Raise `SponError` unless the first precision is a floating-point one and all can be loaded."""
    if not precisions or precisions[0] not in FLOATS:
        raise SponError.of("precisions", list(precisions), f"a full precision first: {', '.join(FLOATS)}")
    for precision in precisions:
        check_precision(precision)


def check_adapter(adapter: Adapter, inputs: Mapping[str, int], model: str, sparsity: float) -> None:
    """Raise `SponError` unless an adapter fits the model, carries alphas and has the target of the study's own.

    Args:
        adapter: to take the place of one trained on the full-precision base.
        inputs: module path -> in_features of the model's linears.
        model: its name.
        sparsity: the study's.
    """
    adapter.check_base(inputs, model)
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


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Bars per precision: dense, TEAL, SPON with the full-precision adapter and with the base's own."""
    tests = list(rows[0]["tests"])
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    bars = [("dense", FULL, ""), ("teal", FULL, ""), ("spon", FULL, ""), ("spon", OWN, "//")]
    labels = ["dense", "TEAL", "SPON, full-precision adapter", "SPON, trained on this base"]
    with figure(file, len(tests), width=1.4 * len(precisions) + 2) as panels:
        for axes, test in zip(panels, tests, strict=True):
            for index, ((variant, origin, hatch), label) in enumerate(zip(bars, labels, strict=True)):
                found = [
                    (precisions.index(row["precision"]), row["tests"][test][variant])
                    for row in rows
                    if row["adapter"] == origin and row["tests"][test][variant] is not None
                ]
                color = COLORS["dense" if variant == "dense" else variant.upper()]
                places = [place + (index - 1.5) * 0.2 for place, _ in found]
                axes.bar(places, [v for _, v in found], 0.2, label=label, color=color, hatch=hatch, edgecolor="white")
            axes.set_xticks(range(len(precisions)), precisions)
            axes.set(title=test, ylabel="perplexity")
        panels[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
