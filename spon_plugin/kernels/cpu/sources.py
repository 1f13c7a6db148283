# SPDX-License-Identifier: Apache-2.0
"""What compiled functions were compiled from, so that none is loaded from Numba's cache after a change elsewhere."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


@cache
def fingerprint(folder: Path = Path(__file__).parent) -> int:
    """Of the source files that a thread function is made of.

    Numba's cache looks at the file of the outermost function alone. One that was compiled for another order of the
    fields would read and write at whatever lies in their place: the functions hold this number, which is part of their
    key in the cache.

    Args:
        folder: with the files.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "big")
