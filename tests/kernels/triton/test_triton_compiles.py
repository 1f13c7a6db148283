# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compile for a GPU that need not be there, and the machine code skips what it promises to skip."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spon_plugin.kernels.triton.configs import DIRECTORY

pytest.importorskip("triton", reason="the GPU kernels are written in Triton")
ROOT = Path(__file__).parents[3]


def compiled(what: str, cache: Path) -> list[dict]:
    """Compile in a process of its own, because this one may interpret Triton."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.compile_triton", what],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert {line["kernel"] for line in lines} >= {"_dense_mask", "_gather", "_list_kept"}
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(path.name for path in DIRECTORY.glob("*.json")))
def test_shipped_launches_compile_for_hopper(config: str, tmp_path: Path) -> None:
    for line in compiled(str(DIRECTORY / config), tmp_path):
        assert line["stack"] == 0, f"registers spill: {line}"
        if line["kernel"] in ("_dense_mask", "_gather"):
            # Sixteen bytes a thread, each load on condition that its row is wanted.
            loads = line["weight_loads"] == [".v4.b32"] and line["weight_loads_predicated"]
            copies = line["weight_loads"] == [] and line["copies"] > 0 and line["copies_predicated"]
            assert loads or copies, line
            assert line["tensor_cores"] == (line["rows"] > 1), line


@pytest.mark.slow
def test_every_kind_of_argument_compiles_for_hopper(tmp_path: Path) -> None:
    for line in compiled("variants", tmp_path):
        assert line["weight_loads_predicated"] and line["copies_predicated"], line
