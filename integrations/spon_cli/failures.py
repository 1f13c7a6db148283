# SPDX-License-Identifier: Apache-2.0
"""How a command ends that cannot go on: one sentence, and an exit code that tells wrong input from bad luck."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.text import Text

from spon_cli.output import ClosedOutput, drop, err, flush
from spon_plugin import SponError

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130
DEBUG = "SPON_DEBUG"


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """Turn whatever is raised into ``error: ...`` on standard error and an exit code.

    With ``SPON_DEBUG=1`` in the environment, the traceback comes first.

    Raises:
        SystemExit: 1, something failed (disk, memory, network, a fault of a library or of ours); 2, wrong input; 130,
            interrupted; 0, whoever reads standard output has closed it.
    """
    try:
        yield
        flush(sys.stdout)
    except ClosedOutput:
        drop(sys.stdout)
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if os.environ.get(DEBUG, "0") != "0":
            traceback.print_exc()
        message, code = ending(error)
        if message:
            # Text and not markup, and one line whatever the library at fault put into its message.
            err.print(Text(f"error: {' '.join(message.splitlines())}", style="red"), soft_wrap=True)
        try:
            flush(sys.stdout)
        except (OSError, ClosedOutput):
            drop(sys.stdout)
        sys.exit(code)


def ending(error: Exception) -> tuple[str, int]:
    """An exception as a sentence and an exit code."""
    if isinstance(error, SponError):
        return str(error), WRONG_INPUT
    if hasattr(error, "format_message"):  # typer's and click's, which share no base class
        context: Any = getattr(error, "ctx", None)
        sentence = str(error.format_message()).strip()
        if sentence and context is not None:
            sentence = f"{sentence.rstrip('.')}. See {context.command_path} --help."
        return sentence, int(getattr(error, "exit_code", WRONG_INPUT))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        advice = "Take a smaller window or batch, a shorter text, or a smaller --dtype"
        return f"out of memory ({_line(error)}). {advice}.", FAILED
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return (f"{error.strerror}{place}" if error.strerror else _line(error)), FAILED
    if isinstance(error, ImportError):
        return f"{_line(error)}. Install what is missing; pip install 'spon-plugin[cli]' brings the usual.", FAILED
    # Libraries written in C++ and Rust report a full disk in errors of their own.
    if any(words in str(error) for words in ("I/O error", "No space left", "PytorchStreamWriter failed writing")):
        return f"writing failed: {_line(error)}", FAILED
    sentence = f"{type(error).__name__}: {_line(error)}"
    return f"{sentence.rstrip('.')}. Set {DEBUG}=1 for the traceback.", FAILED


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
