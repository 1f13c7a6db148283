# SPDX-License-Identifier: Apache-2.0
"""How every plot of the commands is set up: its size, its colours, and files of the same bytes for the same figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLORS = {"dense": "0.5", "TEAL": "tab:orange", "SPON": "tab:blue"}


@contextmanager
def figure(file: Path, panels: int = 1, width: float = 6.5, height: float = 4.5) -> Iterator[list[Any]]:
    """Yield axes side by side, and save the figure when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, panels, figsize=(width * panels, height), layout="constrained", squeeze=False)
    try:
        yield list(axes[0])
        # No date and no version in the file, so that the same command gives the same bytes.
        drawn.savefig(file, dpi=120, metadata={"Software": None})
    finally:
        plt.close(drawn)
