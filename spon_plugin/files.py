# SPDX-License-Identifier: Apache-2.0
"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spon_plugin.errors import SponError


def check_new(path: str | Path, field: str = "output") -> Path:
    """Return `path` if nothing is there and its parent can hold it; call it before the work starts.

    Raises:
        SponError: `path` exists, or its nearest existing parent is not a writable directory.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise SponError.of(field, str(path), "a path that does not exist", "Choose another name or remove it.")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SponError.of(field, str(path), f"a path below a writable directory ({parent} is not)")
    return path


@contextmanager
def new_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `path`, renamed to `path` when the block ends without an error.

    Args:
        path: the directory to make; missing parents are made.
        overwrite: replace what is at `path`.

    Raises:
        SponError: `path` exists and `overwrite` is False.
    """
    path = Path(path)
    if not overwrite:
        check_new(path)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.absolute().parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if overwrite and path.exists():
            old = temporary.with_suffix(".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    value = os.umask(0o022)
    os.umask(value)
    return value
