# SPDX-License-Identifier: Apache-2.0
"""How far the work is: bars on a terminal, and where standard error is none, a line now and then for the log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from spon_cli.output import err, note

SECONDS = 25.0  # between lines: a log is promised one in 30, and a busy machine is late
_FIRST_STEPS, _FIRST_SECONDS = 3, 5.0  # of a piece of work, from which its time is told


class Bar(Protocol):
    """One piece of work; call it as the work goes on."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` is done, with a few words on it."""

    def restart(self, name: str) -> None:
        """Begin another piece of work in its place."""


Stage = Callable[[str], Bar]
"""Makes a bar by the name of the work."""


class Clock:
    """The time, and how to wait for it."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait for `event`, but no longer than that; whether it was set."""
        return event.wait(seconds)


clock = Clock()

_log: _Log | None = None  # where standard error is no terminal, while a command runs
_bars: Progress | None = None  # where it is one, while there are bars


@contextmanager
def lines_for_the_log() -> Iterator[None]:
    """Where standard error is no terminal, let no `SECONDS` pass without a line on it while the block runs.

    A block inside another one adds nothing.
    """
    global _log
    if err.is_terminal or _log is not None:
        yield
        return
    _log = _Log()
    try:
        with _log.writing():
            yield
    finally:
        _log = None


@contextmanager
def progress_bars() -> Iterator[Stage]:
    """Yield a function that makes a bar by its name and returns what to call with (done, total[, note]).

    Bars inside a block of bars stand below its own.
    """
    if not err.is_terminal:
        with lines_for_the_log():
            assert _log is not None
            with _log.pieces_of_a_block() as make:
                yield make
        return
    with _drawn() as bars:
        tasks: list[TaskID] = []

        def draw(name: str) -> Bar:
            tasks.append(bars.add_task(name, total=None, note=""))
            return _Drawn(bars, tasks[-1])

        yield draw
        for task in bars.tasks:
            if task.id in tasks and task.total is None:
                bars.update(task.id, completed=1, total=1)


@contextmanager
def _drawn() -> Iterator[Progress]:
    """The one display of bars that a terminal can have."""
    global _bars
    if _bars is not None:
        yield _bars
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    try:
        with Progress(*columns, console=err) as _bars:
            yield _bars
    finally:
        _bars = None


@contextmanager
def row_bars(
    total: int, line: Callable[[dict[str, Any]], str]
) -> Iterator[tuple[Stage, Callable[[dict[str, Any], bool], None]]]:
    """Two bars, for all rows of a table and for the work at hand, and a line for every row that is done.

    Args:
        total: how many rows there will be.
        line: a row in words.

    Yields:
        A function that gives the work's bar a new name and returns it, and one to call with every row that is there
        and whether it had been before.
    """
    with progress_bars() as make:
        rows, work = make("Rows"), make("")
        rows(0, total)
        count = 0

        def stage(name: str) -> Bar:
            work.restart(name)
            return work

        def done(row: dict[str, Any], old: bool) -> None:
            nonlocal count
            count += 1
            rows(count, total)
            if not old:
                note(line(row))

        yield stage, done


@dataclass(frozen=True)
class _Drawn:
    """A bar on a terminal."""

    bars: Progress
    task: TaskID

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self.bars.update(self.task, completed=done, total=total, note=note)

    def restart(self, name: str) -> None:
        self.bars.reset(self.task, description=name, total=None)


@dataclass
class _Written:
    """What a line says of a piece of work."""

    log: _Log
    name: str
    done: int = 0
    total: int | None = None
    note: str = ""
    start: float = field(default_factory=lambda: clock.now())
    told: bool = False  # how long it takes, by its first steps

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self.done, self.total, self.note = done, total, note
        if not self.told and done >= _FIRST_STEPS and clock.now() - self.start >= _FIRST_SECONDS:
            self.told = True
            if self.left > SECONDS:
                self.log.write()

    def restart(self, name: str) -> None:
        self.name, self.done, self.total, self.note, self.start, self.told = name, 0, None, "", clock.now(), False

    @property
    def ended(self) -> bool:
        return self.total is not None and self.done >= self.total

    @property
    def left(self) -> float:
        """Seconds to go, by those of what is done; 0 where nothing says it."""
        if self.total is None or not 0 < self.done < self.total:
            return 0.0
        return (clock.now() - self.start) * (self.total - self.done) / self.done

    def __str__(self) -> str:
        words = [self.name if self.total is None else f"{self.name}: {self.done} of {self.total}", self.note]
        words.append(f"{duration(clock.now() - self.start)} so far")
        if self.left:
            words.append(f"about {duration(self.left)} left")
        return ", ".join(word for word in words if word)


class _Log:
    """Writes a line of the work at hand every `SECONDS`, also while one step takes longer than that."""

    def __init__(self) -> None:
        self._pieces: list[_Written] = []
        self._start = clock.now()
        self._ended = threading.Event()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write while the block runs."""
        writer = threading.Thread(target=self._write_on, name="progress", daemon=True)
        writer.start()
        try:
            yield
        finally:
            self._ended.set()
            writer.join()

    @contextmanager
    def pieces_of_a_block(self) -> Iterator[Stage]:
        """Yield what adds a piece of work; at the end of the block they are no longer at hand."""
        before = list(self._pieces)

        def make(name: str) -> Bar:
            piece = _Written(self, name)
            self._pieces.append(piece)
            return piece

        try:
            yield make
        finally:
            self._pieces = before

    def write(self) -> None:
        """Write a line."""
        last = self._pieces[-1:]  # others of unknown length have been followed by it
        at_hand = [piece for piece in self._pieces if not piece.ended and (piece.total is not None or piece in last)]
        idle = [f"Working, {duration(clock.now() - self._start)} so far"]
        note("; ".join(map(str, at_hand or last or idle)))

    def _write_on(self) -> None:
        while not clock.wait(self._ended, SECONDS):
            self.write()


def duration(seconds: float) -> str:
    """``95`` as ``2 min``, ``40`` as ``40 s``, ``3900`` as ``1 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
