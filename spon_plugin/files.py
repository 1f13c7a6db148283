# SPDX-License-Identifier: Apache-2.0
"""Outputs that belong to one process at a time and appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spon_plugin.errors import SponError

try:
    import fcntl
except ImportError:  # Windows: nothing to lock with, so outputs are not claimed there
    fcntl = None  # type: ignore[assignment]


def user_path(name: str | Path, field: str, expected: str = "a path") -> Path:
    """A path as the user gave it, with ``~`` and ``~user`` as the home directories that they stand for.

    Args:
        name: the path; nothing need be there.
        field: what errors call it.
        expected: what it should be, in their words.

    Raises:
        SponError: there is no such user, or no file can have that name.
    """
    try:
        path = Path(name).expanduser()
        path.exists()  # raises for a name that no file can have
    except (OSError, RuntimeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).rstrip(".")
        raise SponError.of(field, str(name), f"{expected} ({reason})") from error
    return path


def check_new(path: str | Path, field: str = "output") -> Path:
    """Return `path` if nothing is there and its parent can hold it; call it before the work starts.

    Raises:
        SponError: `path` exists, or its nearest existing parent is not a writable directory.
    """
    path = Path(path)
    with _possible(path, field):
        if path.exists() or path.is_symlink():
            raise SponError.of(field, str(path), "a path that does not exist", "Choose another name or remove it.")
        _check_parent(path, field)
    return path


def make_directory(path: str | Path, field: str = "output") -> Path:
    """Make a directory and its parents, or leave the one that is there as it is.

    Raises:
        SponError: something else is there, or its nearest existing parent is not a writable directory.
    """
    path = Path(path)
    with _possible(path, field):
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            raise SponError.of(field, str(path), "a directory, or a path that does not exist", "Choose another name.")
        _check_parent(path, field)
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def _possible(path: Path, field: str) -> Iterator[None]:
    """Turn what the system says of a path that cannot be made (too long, say) into `SponError`; not a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        raise SponError.of(field, str(path), f"a path that can be made ({error.strerror})") from error


def _check_parent(path: Path, field: str) -> None:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SponError.of(field, str(path), f"a path below a writable directory ({parent} is not)")


@contextmanager
def claim(path: str | Path, field: str = "output") -> Iterator[Path]:
    """Keep other processes from writing `path` while the block runs; enter it before the work starts.

    The claim is a lock on a hidden file beside `path`, which the operating system gives up when the process ends, in
    whatever way. Missing parents are made, and removed again where the block leaves nothing in them.

    Args:
        path: the file or directory to be written, which may exist.
        field: what errors call it.

    Raises:
        SponError: another process (or another block of this one) holds the claim, or the nearest existing parent is
            not a writable directory.
    """
    path = Path(path)
    with _possible(path, field):
        _check_parent(path, field)
        file = path.absolute().parent / f".{path.name}.lock"
        made = [parent for parent in file.parents if not parent.exists()]
    if fcntl is None:
        yield path
        return
    lock = None
    try:
        with _possible(path, field):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = _locked(file)
        if lock is None:
            expected = "a path that no other process is writing"
            raise SponError.of(field, str(path), expected, "Wait for the other command, or choose another name.")
        yield path
    finally:
        if lock is not None:
            file.unlink(missing_ok=True)  # before the lock goes, or it might be the next holder's file
            os.close(lock)
        for parent in made:  # those that hold nothing after all, the deepest first
            with suppress(OSError):
                parent.rmdir()


def _locked(file: Path) -> int | None:
    """Open and lock `file`; None where it is locked already."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        os.close(descriptor)  # its last holder has removed it meanwhile: this is no longer the file at that path


@contextmanager
def new_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `path`, renamed to `path` when the block ends without an error.

    What it holds then has the permissions that the process's umask gives new files, whoever wrote it.

    Args:
        path: the directory to make; missing parents are made.
        overwrite: replace what is at `path`.

    Raises:
        SponError: `path` exists and `overwrite` is False.
    """
    path = Path(path)
    if not overwrite:
        check_new(path)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        _follow_umask(temporary)
        if overwrite and path.exists():
            old = temporary.with_suffix(".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_new(path: str | Path, text: str) -> None:
    """Write a text file, under a temporary name until it is whole.

    Args:
        path: the file to make; missing parents are made.
        text: written in UTF-8, what that cannot hold as backslash sequences.

    Raises:
        SponError: something is at `path`.
    """
    path = check_new(path)
    temporary = _beside(path)
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A temporary name in the directory of `path`, which is made if it is not there."""
    parent = path.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    return parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


def _follow_umask(directory: Path) -> None:
    """Give files that a library wrote for their owner alone the permissions that `directory` itself was made with."""
    mode = directory.stat().st_mode & 0o777
    for each in directory.rglob("*"):
        if not each.is_symlink():
            each.chmod(mode if each.is_dir() else each.stat().st_mode & 0o111 | mode & 0o666)
