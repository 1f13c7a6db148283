# SPDX-License-Identifier: Apache-2.0
"""The wheel alone is enough: what it holds runs outside a checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = """
import importlib, pkgutil, sys
from pathlib import Path
place = Path(sys.argv.pop(1)).resolve()
for package in ("spon_plugin", "spon_transformers", "spon_peft", "spon_lm_eval", "spon_cli"):
    found = importlib.import_module(package)
    assert place in Path(found.__file__).resolve().parents, found.__file__
    for module in pkgutil.walk_packages(found.__path__, package + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
import spon_autoload
assert place in Path(spon_autoload.__file__).resolve().parents
assert (place / "spon_vllm" / "__init__.py").is_file()
from spon_cli.main import main
main()
"""


@pytest.mark.slow
def test_a_wheel_outside_the_checkout_has_all_that_commands_need(adapter, tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path / "wheel"), str(ROOT)], check=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    place = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(place), str(wheel)], check=True)
    assert (place / "spon_plugin" / "kernels" / "configs" / "default.json").is_file()
    command = [sys.executable, "-c", CODE, str(place), "inspect", str(adapter)]
    alone = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=alone)
    assert done.returncode == 0, done.stderr
    assert "Sparsified linears" in done.stdout
