# SPDX-License-Identifier: Apache-2.0
"""What the command line is tried on: a text."""

from pathlib import Path

import pytest
from commands import TEXT


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")
