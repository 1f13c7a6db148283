# SPDX-License-Identifier: Apache-2.0
"""Other checkouts of this repository, which a benchmark measures beside its own in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def checkouts(against: Sequence[Path]) -> dict[str, Path]:
    """By name: ``this`` one, and others by that of their folder."""
    here = Path(__file__).resolve().parent.parent
    return {"this": here, **{path.name: path.resolve() for path in against}}


def environment(checkout: Path) -> dict[str, str]:
    """Of a process that imports the packages of a checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "integrations")])}
