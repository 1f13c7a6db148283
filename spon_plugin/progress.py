# SPDX-License-Identifier: Apache-2.0
"""How long work tells how far it is, without knowing who draws the bar."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


def no_progress(_done: int, _total: int) -> None:
    """Tell nobody."""
