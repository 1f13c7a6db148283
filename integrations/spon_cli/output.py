# SPDX-License-Identifier: Apache-2.0
"""What the commands show: tables and progress bars for people, one JSON object for machines.

Results go to standard output; progress and errors to standard error, so that ``--json`` can be piped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Bar:
    """One progress bar; call it as the work goes on."""

    bars: Progress
    task: TaskID

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Set the bar to `done` of `total`, with a note at its end."""
        self.bars.update(self.task, completed=done, total=total, note=note)


@contextmanager
def progress_bars() -> Iterator[Callable[[str], Bar]]:
    """Yield a function that makes a bar by its name and returns what to call with (done, total[, note])."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err) as bars:

        def stage(name: str) -> Bar:
            return Bar(bars, bars.add_task(name, total=None, note=""))

        yield stage


@contextmanager
def row_bars(
    total: int, line: Callable[[dict[str, Any]], str]
) -> Iterator[tuple[Callable[[str], Bar], Callable[[dict[str, Any], bool], None]]]:
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
            work.bars.reset(work.task, description=name, total=None)
            return work

        def done(row: dict[str, Any], old: bool) -> None:
            nonlocal count
            count += 1
            rows(count, total)
            if not old:
                err.print(line(row))

        yield stage, done


def show_json(value: dict[str, Any]) -> None:
    """Print one JSON object."""
    print(json.dumps(value, indent=2))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str | None = None) -> None:
    """Print a table; the first column is text, the others are figures."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(_cell, row))
    out.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4g}"


def percent(share: float | None) -> str | None:
    """``0.5`` as ``50.0%``."""
    return None if share is None else f"{100 * share:.1f}%"


def note(text: str) -> None:
    """Tell the user something beside the result."""
    err.print(text)
