# SPDX-License-Identifier: Apache-2.0
"""The command line in the tests' own process."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from spon_cli.main import main

TEXT = "".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(600))


def run(*arguments: object, **environment: str) -> tuple[int, str, str]:
    """Run ``spon`` with arguments; returns (exit code, standard output, standard error)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["spon", *map(str, arguments)])
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()
