# SPDX-License-Identifier: Apache-2.0
"""The search of `benchmarks.tune_sparse_linear`: what is tried, in which order, and how it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from benchmarks.compile_ahead import Compilers, kernel_for
from benchmarks.formats import clone, make, nbytes
from benchmarks.launches import neighbours, reasoned
from benchmarks.timing import copies_for, interleaved_medians
from spon_plugin import RowWeight
from spon_plugin.kernels import gemm
from spon_plugin.kernels.triton.configs import DTYPES, Launch
from spon_plugin.weights.dense import DenseWeight

# A change that is lost in the noise is no reason to go on.
GAIN = 0.99
# Of each list, those that are measured once more, in turns.
FINALISTS = 3
# Bytes of shared memory that the system takes of every program's.
RESERVED = 1024

Seconds = Callable[[Sequence[Launch]], Mapping[Launch, float]]


@dataclass(frozen=True)
class Task:
    """What one launch is searched for.

    Attributes:
        kind: a dtype, or the format of a weight with scales.
        shape: in_features and out_features.
        rows: of x.
        group: inputs that share a scale; 0 for all.
    """

    kind: str
    shape: tuple[int, int]
    rows: int
    group: int = 0


@dataclass
class Search:
    """The fastest launch for one task, a list of candidates at a time.

    Attributes:
        task: what for.
        waiting: the candidates to measure next; empty at the end.
        known: seconds of what was measured, as measured first.
        best: the fastest, if any ran.
        seconds: its time.
    """

    task: Task
    waiting: list[Launch]
    known: dict[Launch, float] = field(default_factory=dict)
    best: Launch | None = None
    seconds: float = float("inf")

    def measure(self, timer: Seconds, ready: Sequence[Launch]) -> None:
        """Measure candidates; then wait for the neighbours of the best, unless the last ones changed nothing.

        Args:
            timer: seconds of each of some launches, measured in turns; infinite for one that cannot run.
            ready: which of `waiting`; the rest is given up.
        """
        for launch in ready:
            self.known.update(timer([launch]))
        order = sorted(ready, key=self.known.__getitem__)[:FINALISTS]
        finalists = [launch for launch in order if self.known[launch] < float("inf")]
        if self.best is not None and self.best not in finalists:
            finalists.append(self.best)
        measured = timer(finalists) if finalists else {}
        # Nothing is measured once the time is up.
        times = {launch: taken for launch, taken in measured.items() if taken < float("inf")}
        times = times or {launch: self.known[launch] for launch in finalists}
        before = self.best
        if times:
            fastest = min(times, key=times.__getitem__)
            # The one that stands is given up for a gain only.
            stays = before is not None and times[fastest] >= GAIN * times.get(before, float("inf"))
            self.best = before if stays else fastest
            self.seconds = times[self.best or fastest]
        near: list[Launch] = []
        if self.best is not None and self.best != before:
            near = list(neighbours(self.task.kind, self.task.rows, self.best, self.task.group))
        self.waiting = [launch for launch in near if launch not in self.known]


class Results(Protocol):
    """Takes what is found."""

    def present(self, task: Task) -> Launch:
        """What would be launched for a task as it is."""

    def add(self, search: Search, dense: float) -> None:
        """Take in what a search has found, beside the seconds of the dense product."""


class Timer:
    """What measures tasks on a device; holds the weights of one shape at a time."""

    def __init__(self, sparsity: float, seconds: float, device: str = "cuda") -> None:
        self._sparsity, self._seconds, self._device = sparsity, seconds, torch.device(device)
        self._key: tuple[str, tuple[int, int], int] | None = None
        self._weights: list[RowWeight] = []

    def _prepare(self, task: Task) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = self._device
        dtype = DTYPES.get(task.kind, torch.bfloat16)
        if (key := (task.kind, task.shape, task.group)) != self._key:
            self._weights = []
            generator = torch.Generator(device).manual_seed(0)
            kind = "dense" if task.kind in DTYPES else task.kind
            weight = make(kind, task.shape, dtype, task.group, generator)
            self._weights = [clone(weight) for _ in range(copies_for(nbytes(weight), device))]
            self._key = key
        generator = torch.Generator(device).manual_seed(task.rows)
        x = torch.randn(task.rows, task.shape[0], generator=generator, device=device).to(dtype)
        threshold = x.abs().float().flatten().quantile(self._sparsity).view(1)
        return x, threshold, torch.zeros(task.shape[1], dtype=dtype, device=device)

    def sparse(self, task: Task, launches: Sequence[Launch]) -> dict[Launch, float]:
        """Seconds of launches, in turns; infinite for all if one of them cannot run."""
        x, threshold, bias = self._prepare(task)
        weights = [one.codes if isinstance(one, DenseWeight) else one for one in self._weights]

        def call(launch: Launch, i: int) -> object:
            return kernel_for(task.kind, launch)(x, weights[i], threshold, bias, launch=launch)

        calls = {str(place): partial(call, launch) for place, launch in enumerate(launches)}
        try:
            times = interleaved_medians(calls, len(weights), x.device, self._seconds * len(calls))
        except Exception as error:
            # Triton's own, and its compiler's: a launch that a GPU has no room for, or that does not compile.
            print(f"{task}: {launches} cannot run: {type(error).__name__}: {str(error)[:200]}", flush=True)
            return dict.fromkeys(launches, float("inf"))
        return {launch: times[str(place)] for place, launch in enumerate(launches)}

    def dense(self, task: Task) -> float:
        """Seconds of the masked dense GEMM; of a weight with scales, on a matrix of bfloat16 in its place."""
        x, threshold, bias = self._prepare(task)
        if task.kind in DTYPES:
            matrices = [one.codes for one in self._weights]
        else:
            size = task.shape[0] * task.shape[1] * x.element_size()
            first = self._weights[0].dense().to(x.dtype)
            matrices = [first.clone() for _ in range(copies_for(size, x.device))]
        call = {"it": lambda i: gemm.sparse_linear(x, matrices[i], threshold, bias)}
        return interleaved_medians(call, len(matrices), x.device, self._seconds)["it"]


def tune(stages: Sequence[Sequence[Task]], timer: Timer, done: Results, end: float) -> None:
    """Search for all tasks of a stage, round by round, before the next stage begins; until the time `end`.

    Args:
        stages: tasks, the most important stage first.
        timer: measures.
        done: takes what is found.
        end: on `time.monotonic`'s clock.
    """
    compilers = Compilers()
    futures: dict[tuple[Task, Launch], Future[int]] = {}

    def submit(search: Search) -> None:
        task = search.task
        for launch in search.waiting:
            fitted = launch.fitted(*fit(task.shape))
            futures[task, launch] = compilers.submit(task.kind, task.shape, task.group, task.rows, fitted)

    def ready(search: Search) -> Iterator[Launch]:
        for launch in search.waiting:
            try:
                shared = futures.pop((search.task, launch)).result(max(0.0, end - time.monotonic()))
            except NotYet:
                continue
            except BrokenExecutor:
                # A compiler has ended, and its pool with it: what is left compiles here, when it is measured.
                shared = 0
            except Exception as error:
                print(f"{search.task}: {launch} does not compile: {str(error)[:200]}", flush=True)
                continue
            if launch.resident * (shared + RESERVED) <= shared_memory():
                yield launch

    try:
        for tasks in stages:
            searches = [Search(task, reasoned(task.kind, task.rows, done.present(task), task.group)) for task in tasks]
            for search in searches:
                submit(search)
            dense: dict[Task, float] = {}
            while live := [search for search in searches if search.waiting]:
                for search in live:
                    candidates = list(ready(search))
                    if time.monotonic() >= end:
                        return
                    if search.task not in dense:
                        dense[search.task] = timer.dense(search.task)
                    search.measure(partial(timed, timer, search.task, end), candidates)
                    submit(search)
                    done.add(search, dense[search.task])
    finally:
        compilers.close()


def timed(timer: Timer, task: Task, end: float, launches: Sequence[Launch]) -> dict[Launch, float]:
    """Seconds of launches, fitted to the device; infinite after the time `end`."""
    if time.monotonic() >= end:
        return dict.fromkeys(launches, float("inf"))
    fitted = {launch: launch.fitted(*fit(task.shape)) for launch in launches}
    times = timer.sparse(task, list(dict.fromkeys(fitted.values())))
    return {launch: times[fitted[launch]] for launch in launches}


def fit(shape: tuple[int, int]) -> tuple[int, tuple[int], int]:
    """What `Launch.fitted` takes for a shape on the current CUDA device."""
    return shape[0], (shape[1],), multiprocessors()


def multiprocessors() -> int:
    """Those of the current CUDA device."""
    return torch.cuda.get_device_properties(None).multi_processor_count


def shared_memory() -> int:
    """Bytes of shared memory of a multiprocessor of the current CUDA device."""
    return torch.cuda.get_device_properties(None).shared_memory_per_multiprocessor
