# SPDX-License-Identifier: Apache-2.0
"""Commands that take long say at their start what they found, what they will do, and how long it is likely to take."""

import pytest
from commands import run

from spon_plugin import machine

SHORT = ["--windows", 4, "--seed", 1]
STUDY = ["--max-tokens", 64, "--window", 32, "--calibration-tokens", 1024]


@pytest.fixture(autouse=True)
def machine_is_asked_anew():
    """What the machine multiplies is asked once a process."""
    machine.native_dtypes.cache_clear()
    yield
    machine.native_dtypes.cache_clear()


@pytest.mark.parametrize(
    ("command", "arguments", "plan"),
    [
        ("train", ["--window", 32], "This calibrates on 16384 tokens, trains 2 steps of 2 x 32 tokens and measures"),
        (
            "compare",
            ["--methods", "teal", "--sparsity", 0.5, "--alpha", "off,on", *STUDY],
            "This measures 3 rows, less",
        ),
        ("ablate", ["--study", "halves", "--train-window", 64, *STUDY], "This varies halves; rows that "),
    ],
)
def test_the_first_lines_of_the_log(tiny_model_dir, text, tmp_path, command, arguments, plan):
    tests = [] if command == "train" else ["--test", text]
    command = [command, tiny_model_dir, "-o", tmp_path / "out", "--text", text, *tests, *SHORT, *arguments]
    code, _, err = run(*command, SPON_NATIVE_DTYPES="none")
    assert code == 0, err
    first, *others = err.splitlines()
    assert first.startswith("CPU, ") and "bfloat16 emulated, no GPU. " + plan in first
    assert "0 million parameters, computing in float32: about a minute by this machine's speed in products." in others
