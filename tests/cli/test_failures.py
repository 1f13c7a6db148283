# SPDX-License-Identifier: Apache-2.0
"""A command that cannot go on ends in one sentence and an exit code, whatever was raised."""

import errno
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import run
from safetensors import SafetensorError

import spon_cli
from spon_cli.commands import calibrate
from spon_plugin import SponError

KINDS = {
    "wrong input": (SponError.of("field", 1, "2", "Do this."), 2, "field: got 1, expected 2. Do this."),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 1, "No space left on device: /a/b"),
    "full disk under safetensors": (
        SafetensorError("I/O error: full (os error 28)"),
        1,
        "writing failed: I/O error: full",
    ),
    "broken socket": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "Broken pipe"),
    "memory": (MemoryError(), 1, "out of memory (MemoryError). Take a smaller window or batch"),
    "accelerator's memory": (torch.OutOfMemoryError("tried 3 GiB\n..."), 1, "out of memory (tried 3 GiB). Take"),
    "package": (ImportError("no backend\nat all"), 1, "no backend. Install what is missing"),
    "recursion": (RecursionError("maximum depth"), 1, "RecursionError: maximum depth. Set SPON_DEBUG=1 for"),
    "no words": (KeyError(), 1, "KeyError: KeyError. Set SPON_DEBUG=1 for the traceback."),
    "many lines": (RuntimeError("first.\n  second\n"), 1, "RuntimeError: first. Set SPON_DEBUG=1 for the traceback."),
    "end of input": (EOFError(), 1, "EOFError: EOFError. Set SPON_DEBUG=1"),
}


@pytest.fixture
def raising(monkeypatch):
    """A command that raises what it is told to."""

    def of(error: BaseException) -> tuple[object, ...]:
        def raises(*_: object) -> None:
            raise error

        monkeypatch.setattr(calibrate, "check_new", raises)
        return "calibrate", "no-model", "-o", "out"

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_raised_is_said_in_a_sentence(raising, kind):
    error, code, message = KINDS[kind]
    ended, out, err = run(*raising(error))
    assert (ended, out) == (code, "") and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_the_traceback_is_there_for_whoever_asks(raising):
    command = raising(RuntimeError("why"))
    assert "Traceback" not in run(*command)[2] and "Traceback" not in run(*command, SPON_DEBUG="0")[2]
    code, _, err = run(*command, SPON_DEBUG="1")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("error: RuntimeError: why.")


def test_an_interrupt_is_quiet(raising):
    assert run(*raising(KeyboardInterrupt())) == (130, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate"], "Missing argument 'MODEL'. See spon calibrate --help."),
        (["calibrate", "m", "-o", "o", "--window", "four"], "Invalid value for '--window'"),
        (["calibrate", "m", "-o", "o", "--windo", "4"], "No such option: --windo"),
        (["calibrat"], "No such command 'calibrat'"),
        (["calibrate", "m", "-o", "o", "--seed", "-1"], "seed: got -1, expected a number of at least 0."),
        (["calibrate", "m", "-o", "o", "--seed", str(2**70)], f"seed: got {2**70}, expected at most {2**32 - 1}."),
        (["eval", "m", "--adapter", "a", "--batch-size", "0"], "batch_size: got 0, expected a positive number."),
        (["eval", "m", "--adapter", "a", "--window", "1"], "window: got 1, expected a number of at least 2."),
    ],
    ids=["argument", "type", "option", "command", "negative seed", "large seed", "batch", "window"],
)
def test_wrong_usage_is_one_line(arguments, message):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "timeout"])
def test_a_signal_leaves_nothing_behind(tiny_model_dir, text, tmp_path, number, code):
    command = [sys.executable, "-m", "spon_cli", "train", tiny_model_dir, "--text", text, "--epochs", "1000"]
    output = tmp_path / "out"
    process = subprocess.Popen([*map(str, command), "-o", output], stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "out.training" / "plan.json").exists() and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code and "Traceback" not in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_a_missing_dependency_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    for name in [name for name in sys.modules if name.startswith("spon_cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"spon needs typer. Install it with: pip install 'spon-plugin\[cli\]'"):
        spon_cli.run()
