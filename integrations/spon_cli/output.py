# SPDX-License-Identifier: Apache-2.0
"""What the commands show: tables for people, one JSON object for machines.

Results go to standard output and nothing else does; progress, notes and errors go to standard error. Names and paths
are printed as they are: nothing in them is markup.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, TextIO

from rich.console import Console
from rich.table import Table

from spon_plugin.studies.tables import json_text

_UNBOUNDED = 10_000  # columns of a table that no terminal shows


class ClosedOutput(Exception):
    """Nobody reads standard output any more, as under ``| head``; not an error."""


class _Results(Console):
    """Standard output."""

    def on_broken_pipe(self) -> None:
        """Stop: who closed the pipe has seen enough."""
        raise ClosedOutput


class _Messages(Console):
    """Standard error."""

    def on_broken_pipe(self) -> None:
        """Go on: the work does not depend on who reads of it."""
        self.quiet = True
        drop(self.file)


out = _Results(highlight=False, markup=False, emoji=False)
err = _Messages(stderr=True, highlight=False, markup=False, emoji=False)


@contextmanager
def results_only() -> Iterator[None]:
    """Keep standard output for `show_json`, `show_table` and `show`: what libraries print meanwhile goes to the error.

    That holds for Python's `sys.stdout`, and for the file descriptor where they are the same.
    """
    stream = sys.stdout
    with _descriptor_to_stderr(stream) as results:
        sys.stdout, out.file = sys.stderr, results
        if not out.is_terminal:
            columns = os.environ.get("COLUMNS", "")
            out.width = int(columns) if columns.isdigit() else _UNBOUNDED
        try:
            yield
            flush(results)
        finally:
            sys.stdout = stream
            out.file = None  # type: ignore[assignment]


@contextmanager
def _descriptor_to_stderr(stream: TextIO) -> Iterator[TextIO]:
    """Let file descriptor 1 be standard error, if it is `stream`; yields a stream to what it was."""
    try:
        stream.flush()
        kept = os.dup(1) if stream.fileno() == 1 else None
    except (OSError, AttributeError, ValueError):  # closed, or no file: a test's, a notebook's
        kept = None
    if kept is None:
        yield stream
        return
    results = os.fdopen(kept, "w", encoding=stream.encoding, errors="backslashreplace")
    with suppress(OSError):  # standard error may be closed
        os.dup2(2, 1)
    try:
        yield results
    finally:
        os.dup2(kept, 1)
        with suppress(OSError):  # flushed before, where that matters
            results.close()


def flush(stream: IO[str] | None) -> None:
    """Write what is left in a stream's buffer; None, no stream at all, has nothing left.

    Raises:
        ClosedOutput: nobody reads it.
        OSError: the disk is full.
    """
    if stream is None:
        return
    try:
        stream.flush()
    except BrokenPipeError:
        raise ClosedOutput from None


def drop(stream: IO[str] | None) -> None:
    """Send nowhere what could not be written, so that Python does not try again at its end."""
    with suppress(OSError, AttributeError, ValueError):  # no stream, or no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


def show(text: str) -> None:
    """Print a line of the result."""
    out.print(text, soft_wrap=True)


def show_json(value: dict[str, Any]) -> None:
    """Print one JSON object; numbers that JSON does not have become null."""
    try:
        out.file.write(json_text(value))
    except BrokenPipeError:
        raise ClosedOutput from None


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str | None = None) -> None:
    """Print a table; the first column is text, the others figures."""
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
    err.print(text, soft_wrap=True)
