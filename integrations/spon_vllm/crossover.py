# SPDX-License-Identifier: Apache-2.0
"""``max_sparse_tokens: auto``: up to how many rows sparse steps are the faster ones, measured on the layers at hand.

One number holds for all layers, so that a step is the sparse model or the dense one. It is found once the weights are
in place, before vLLM warms up or captures anything, and kept in a file: a restart is to answer as before, and timing is
never twice the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import vllm.envs as envs
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from spon_plugin.kernels.cpu.sources import fingerprint
from spon_plugin.kernels.few_rows import CPU_ROWS, GPU_ROWS
from spon_plugin.machine import device_name, name_of
from spon_vllm import steps
from spon_vllm.settings import BESIDE, EVERY_STEP, NO_STEP, ROWS, Settings

logger = init_logger("vllm.spon")

SPARSE, DENSE, BASE = "sparse", "dense", "base"
"""Ways of a step: sparse, dense by our kernels, dense by the method of a base whose weights are held beside ours."""

# A dense step is the dense model: a sparse one has to gain more than the noise of timing.
_WORTH = 0.95
_REPEATS = 5
# Weights of a kind that are read in turn: more than the caches hold, as in a model.
_BYTES = 128 << 20


class Kind(NamedTuple):
    """Layers that take the same time.

    Attributes:
        in_features: of this rank.
        out_features: likewise.
        weights: format or dtype, and how they are held.
        masks: how many different ones a fused layer has.
    """

    in_features: int
    out_features: int
    weights: str
    masks: int

    @staticmethod
    def of(layer: Any) -> Kind:
        """That of a sparse layer of vLLM's that is ready."""
        method = layer.quant_method
        if method.layout is not None:
            held = f"{method.layout.format} {'in rows' if method.weights == ROWS else 'beside'}"
        else:
            held = name_of(layer.params_dtype) if method.plain else "the base's own"
        return Kind(method.in_part, sum(method.sizes), held, len(method.shard_sizes or [0]))


@dataclass
class Table:
    """What was measured.

    Attributes:
        layers: kind -> how many layers of the model are of it.
        seconds: (kind, way, rows) -> of one layer.
    """

    layers: dict[Kind, int]
    seconds: dict[tuple[Kind, str, int], float] = field(default_factory=dict)

    def step(self, rows: int) -> tuple[float, float]:
        """Seconds of all layers in a sparse step of `rows` rows, and in a dense one."""
        sparse = dense = 0.0
        for kind, number in self.layers.items():
            sparse += number * self.seconds[kind, SPARSE, rows]
            dense += number * min(self.seconds[kind, way, rows] for way in (DENSE, BASE) if self.has(kind, way, rows))
        return sparse, dense

    def has(self, kind: Kind, way: str, rows: int) -> bool:
        """Whether that was measured."""
        return (kind, way, rows) in self.seconds

    def sizes(self) -> list[int]:
        """The numbers of rows at which sparse steps were measured."""
        return sorted({rows for _, way, rows in self.seconds if way == SPARSE})

    def gains(self, rows: int) -> bool:
        """Whether a sparse step of `rows` rows is worth what it leaves out."""
        sparse, dense = self.step(rows)
        return sparse <= _WORTH * dense

    def limit(self) -> int:
        """The most rows up to which every step that was measured gains; at least 1, where there is no other."""
        found = 1
        for rows in self.sizes():
            if rows > 1 and not self.gains(rows):
                break
            found = rows
        return found

    def own_rows(self, kind: Kind) -> int:
        """The most rows of a dense step that our kernels compute faster than the base's own method; 0 for none."""
        sizes = {rows for other, way, rows in self.seconds if other == kind and way == BASE}
        faster = (rows for rows in sizes if self.seconds[kind, DENSE, rows] <= self.seconds[kind, BASE, rows])
        return max(faster, default=0)

    def text(self) -> str:
        """For a log: a line for each kind and number of rows, microseconds of a layer, and the sums of a step."""
        columns: tuple[str, ...] = ("layers", "in", "out", "weights", "rows", SPARSE, DENSE, "dense, base's")
        lines = [columns]
        for kind, number in self.layers.items():
            for rows in sorted({rows for other, _, rows in self.seconds if other == kind}):
                cells = [
                    f"{1e6 * self.seconds[kind, way, rows]:.0f}" if self.has(kind, way, rows) else ""
                    for way in (SPARSE, DENSE, BASE)
                ]
                first = (str(number), str(kind.in_features), str(kind.out_features), kind.weights)
                lines.append((*first, str(rows), *cells))
        for rows in self.sizes():
            sparse, dense = (f"{1e6 * seconds:.0f}" for seconds in self.step(rows))
            lines.append((str(sum(self.layers.values())), "", "", "all", str(rows), sparse, dense, ""))
        widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
        )

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        rows = [[*key[0], *key[1:], seconds] for key, seconds in self.seconds.items()]
        return {"layers": [[*kind, number] for kind, number in self.layers.items()], "seconds": rows}

    @staticmethod
    def from_json(given: dict[str, Any]) -> Table:
        """What `as_json` wrote."""
        size = len(Kind._fields)
        seconds = {(Kind(*row[:size]), row[size], row[size + 1]): row[size + 2] for row in given["seconds"]}
        return Table({Kind(*row[:size]): row[size] for row in given["layers"]}, seconds)


Timer = Callable[[Callable[[], None], torch.device], float]
"""Seconds that a call takes on a device."""


def settle(layers: Sequence[Any], settings: Settings, speaks: bool) -> None:
    """Find the limit of this worker, set `steps.measured`, and let each layer's dense steps run where they are faster.

    Args:
        layers: all of the worker's sparse layers, ready.
        settings: what is served.
        speaks: whether this worker logs, and keeps the table.
    """
    path, key = _place(layers, settings)
    start = time.perf_counter()
    table = _kept(path, key)
    how = f"kept in {path}"
    if table is None:
        device = layers[0].spon_threshold.device
        most = CPU_ROWS if device.type == "cpu" else GPU_ROWS
        table = measure(layers, settings.sparsity, steps.sizes(most), settings.max_sparse_tokens, most, seconds_of)
        how = f"measured in {time.perf_counter() - start:.1f} s, {how}"
        if speaks:
            _keep(path, key, table)
    group = get_tp_group()
    if group.world_size > 1:  # workers of one layer take the same way
        table = Table.from_json(group.broadcast_object(table.as_json(), src=0))
    for layer in layers:
        if layer.quant_method.weights == BESIDE:
            layer.spon_own_rows = table.own_rows(Kind.of(layer))
    steps.set_measured(table.limit())
    if speaks:
        logger.info(
            "SPON: max_sparse_tokens is %d, where %d is the rule at %.0f%% sparsity (%s). Microseconds of a layer:\n%s",
            table.limit(), settings.max_sparse_tokens, 100 * settings.sparsity, how, table.text(),
        )  # fmt: skip


@torch.no_grad()
def measure(layers: Sequence[Any], sparsity: float, sizes: Sequence[int], rule: int, most: int, timer: Timer) -> Table:
    """Time sparse steps against dense ones, from the rule's number of rows on to where the faster way changes.

    Args:
        layers: the sparse layers.
        sparsity: the share of inputs that a row of the timed steps masks.
        sizes: numbers of rows that decoding steps have, ascending.
        rule: the number to start from.
        most: rows that our kernels take.
        timer: see `Timer`.
    """
    kinds: dict[Kind, list[Any]] = {}
    for layer in layers:
        kinds.setdefault(Kind.of(layer), []).append(layer)
    table, samples = Table({kind: len(own) for kind, own in kinds.items()}), {k: _sample(v) for k, v in kinds.items()}

    def time_way(kind: Kind, way: str, rows: int) -> None:
        if not table.has(kind, way, rows):
            table.seconds[kind, way, rows] = _seconds(samples[kind], way, rows, sparsity, timer)

    def gains(rows: int) -> bool:
        for kind, sample in samples.items():
            beside = sample[0].quant_method.weights == BESIDE
            for way in (SPARSE, DENSE, BASE) if beside else (SPARSE, DENSE):
                time_way(kind, way, rows)
        return table.gains(rows)

    for kind, sample in samples.items():
        rows = most
        while sample[0].quant_method.weights == BESIDE and rows > 1:
            time_way(kind, DENSE, rows)
            time_way(kind, BASE, rows)
            if table.own_rows(kind):
                break
            rows //= 2
    gains(sizes[0])
    place = max((index for index, size in enumerate(sizes) if size <= rule), default=0)
    if gains(sizes[place]):
        while place + 1 < len(sizes) and gains(sizes[place + 1]):
            place += 1
    else:
        while place > 0 and not gains(sizes[place - 1]):
            place -= 1
    return table


def seconds_of(call: Callable[[], None], device: torch.device) -> float:
    """Seconds that `call` takes: by the clock, or between two events of the device's stream."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.Event(device, enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def _sample(layers: Sequence[Any]) -> list[Any]:
    """Some of the layers, one after the other: as many as hold more bytes than the caches."""
    size = sum(p.numel() * p.element_size() for p in layers[0].parameters(recurse=False))
    return list(layers[: max(1, -(-_BYTES // max(1, size)))])


def _seconds(layers: Sequence[Any], way: str, rows: int, sparsity: float, timer: Timer) -> float:
    """The median of one layer's seconds; before it, everything runs once, which compiles it and settles its calls."""
    inputs = [_inputs(layer, rows, sparsity) for layer in layers]
    before = [getattr(layer, "spon_own_rows", 0) for layer in layers]

    def sweep() -> None:
        for layer, x in zip(layers, inputs, strict=True):
            layer.quant_method.step(layer, x, None, EVERY_STEP if way == SPARSE else NO_STEP)

    try:
        for layer in layers:
            layer.spon_own_rows = 0 if way == BASE else rows
        sweep()
        return statistics.median(timer(sweep, inputs[0].device) for _ in range(_REPEATS)) / len(layers)
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.spon_own_rows = value


def _inputs(layer: Any, rows: int, sparsity: float) -> Tensor:
    """Random rows that the layer's masks thin out by `sparsity`, each on its own; all of it where they mask nothing.

    None is 0, which kernels would skip in a dense step as well.
    """
    threshold = layer.spon_threshold
    generator = torch.Generator().manual_seed(0)
    shape = rows, layer.quant_method.in_part
    noise, sign = (torch.rand(shape, generator=generator).to(threshold.device) for _ in range(2))
    masks = threshold.reshape(len(threshold), -1)  # of a fused layer
    lowest, highest = masks.amin(0), masks.amax(0)
    below = torch.where(lowest > 0, lowest, highest).clamp(max=2) / 2
    kept = ((noise >= sparsity) | (highest == 0)) & highest.isfinite()
    x = torch.where(kept, 2 * highest + 1, below) * torch.where(sign < 0.5, -1, 1)
    return (x if layer.spon_center is None else x + layer.spon_center).to(layer.params_dtype)


def _place(layers: Sequence[Any], settings: Settings) -> tuple[Path, dict[str, Any]]:
    """The file of a table, and everything that it depends on."""
    device = layers[0].spon_threshold.device
    kinds = [Kind.of(layer) for layer in layers]
    key = {
        "machine": device_name(device),
        "versions": {name: version(name) for name in ("spon-plugin", "torch", "vllm")},
        "kernels": fingerprint(),
        "kinds": [[*kind, kinds.count(kind)] for kind in dict.fromkeys(kinds)],
        "dtype": name_of(layers[0].params_dtype),
        "sparsity": settings.sparsity,
        "rule": settings.max_sparse_tokens,
        "exact": settings.exact,
        "sizes": steps.sizes(CPU_ROWS if device.type == "cpu" else GPU_ROWS),
        "tensor_parallel": get_tp_group().world_size,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return Path(envs.VLLM_CACHE_ROOT) / "spon" / f"max_sparse_tokens-{name}.json", key


def _kept(path: Path, key: dict[str, Any]) -> Table | None:
    try:
        held = json.loads(path.read_text())
        return Table.from_json(held["table"]) if held["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # none, or not whole: it is measured again
        return None


def _keep(path: Path, key: dict[str, Any], table: Table) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"key": key, "table": table.as_json()}) + "\n")
        temporary.replace(path)
    except OSError as error:
        logger.warning("SPON: the table of max_sparse_tokens is not kept: %s", error)
