# SPDX-License-Identifier: Apache-2.0
"""Outputs appear whole, with the permissions of the umask, and belong to one process at a time."""

import os
import signal
import stat
from contextlib import contextmanager

import pytest
import torch
from commands import run
from safetensors.torch import save_file

from spon_plugin.errors import SponError
from spon_plugin.files import claim, new_directory


@contextmanager
def umask(value):
    old = os.umask(value)
    try:
        yield
    finally:
        os.umask(old)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002, 0o077], ids=oct)
def test_what_libraries_write_for_their_owner_alone_follows_the_umask(mask, tmp_path):
    with umask(mask), new_directory(tmp_path / "out") as directory:
        save_file({"a": torch.zeros(1)}, directory / "a.safetensors")
        (directory / "folder").mkdir(mode=0o700)
        (directory / "folder" / "script.sh").touch()
        (directory / "folder" / "script.sh").chmod(0o755)
    out = tmp_path / "out"
    assert mode(out) == mode(out / "folder") == 0o777 & ~mask
    assert mode(out / "a.safetensors") == 0o666 & ~mask
    assert mode(out / "folder" / "script.sh") & 0o666 == 0o666 & ~mask


def test_a_claim_holds_for_one_block_and_leaves_nothing(tmp_path):
    path = tmp_path / "folder" / "out"
    with claim(path), pytest.raises(SponError, match="no other process"), claim(path):
        pass
    with claim(path), claim(tmp_path / "folder" / "other"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_parents_of_a_claim_stay_where_the_work_is(tmp_path):
    path = tmp_path / "folder" / "out"
    with claim(path):
        path.mkdir()
    assert [each.name for each in path.parent.iterdir()] == ["out"]


def test_a_claim_ends_with_its_process(tmp_path):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        with claim(tmp_path / "out"):
            os.write(write, b".")
            signal.pause()
    os.read(read, 1)
    with pytest.raises(SponError, match="no other process"), claim(tmp_path / "out"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with claim(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["calibrate", "train", "compare", "ablate", "quickstart"])
def test_the_second_of_two_commands_with_one_output_is_refused_at_the_start(command, tmp_path):
    model = [] if command == "quickstart" else [tmp_path / "no-such-model"]  # refused before it is looked for
    with claim(tmp_path / "out"):
        code, out, err = run(command, *model, "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "no other process" in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["x" * 300, "x" * 252, "a/" * 3000 + "b", "a/b/" + "x" * 300], ids=["name", "lock", "path", "below"]
)
def test_a_path_that_cannot_be_made_is_named_and_nothing_of_it_stays(tmp_path, name):
    with pytest.raises(SponError, match="output: got .*expected a path that can be made"), claim(tmp_path / name):
        pass
    assert not list(tmp_path.iterdir())
