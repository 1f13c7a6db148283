# SPDX-License-Identifier: Apache-2.0
"""How far the work is: bars on a terminal, and where standard error is none, a line every half minute for the log."""

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

SECONDS = 30.0  # between lines


class Bar(Protocol):
    """One piece of work; call it as the work goes on."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` is done, with a few words on it."""

    def restart(self, name: str) -> None:
        """Begin another piece of work in its place."""


Stage = Callable[[str], Bar]
"""Makes a bar by the name of the work."""


@contextmanager
def progress_bars() -> Iterator[Stage]:
    """Yield a function that makes a bar by its name and returns what to call with (done, total[, note])."""
    if not err.is_terminal:
        with _logged() as lines:
            yield lines
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=err) as bars:
        yield lambda name: _Drawn(bars, bars.add_task(name, total=None, note=""))


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

    name: str
    done: int = 0
    total: int | None = None
    note: str = ""
    start: float = field(default_factory=time.monotonic)

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self.done, self.total, self.note = done, total, note

    def restart(self, name: str) -> None:
        self.name, self.done, self.total, self.note, self.start = name, 0, None, "", time.monotonic()

    @property
    def ended(self) -> bool:
        return self.total is not None and self.done >= self.total

    def __str__(self) -> str:
        passed = time.monotonic() - self.start
        words = [self.name if self.total is None else f"{self.name}: {self.done} of {self.total}", self.note]
        words.append(f"{duration(passed)} so far")
        if self.total is not None and 0 < self.done < self.total:
            words.append(f"about {duration(passed * (self.total - self.done) / self.done)} left")
        return ", ".join(word for word in words if word)


@contextmanager
def _logged() -> Iterator[Stage]:
    """Write a line of the work at hand every `SECONDS`, also while one step takes longer than that."""
    pieces: list[_Written] = []
    ended = threading.Event()

    def make(name: str) -> Bar:
        pieces.append(_Written(name))
        return pieces[-1]

    def write() -> None:
        while not ended.wait(SECONDS):
            last = pieces[-1:]  # others of unknown length have been followed by it
            at_hand = [piece for piece in pieces if not piece.ended and (piece.total is not None or piece in last)]
            at_hand = at_hand or last
            note("; ".join(map(str, at_hand)))

    writer = threading.Thread(target=write, name="progress", daemon=True)
    writer.start()
    try:
        yield make
    finally:
        ended.set()
        writer.join()


def duration(seconds: float) -> str:
    """``95`` as ``2 min``, ``40`` as ``40 s``, ``3900`` as ``1 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
