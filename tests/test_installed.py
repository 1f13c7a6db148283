# SPDX-License-Identifier: Apache-2.0
"""The installed package, in processes that import nothing of ours: what `pip install` alone must bring about."""

import subprocess
import sys

import pytest

BOTH = """
from peft.utils.peft_types import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SPON].__name__ == "SponModel"
assert AUTO_QUANTIZER_MAPPING["spon"].__module__ == "spon_transformers.quantizer"
"""


@pytest.mark.parametrize(
    "first",
    [
        pytest.param("import peft", id="peft"),
        pytest.param("import torch, peft", id="torch"),
        pytest.param("from transformers import AutoModelForCausalLM; import peft", id="transformers"),
        pytest.param("import transformers.quantizers.auto, peft", id="quantizers"),
        pytest.param("from peft.utils import PeftType", id="peft-utils"),
    ],
)
def test_hosts_know_us_whatever_is_imported_first(first, tmp_path):
    """-I: only the installation helps the process to find us. Every warning of ours would be an error."""
    command = [sys.executable, "-I", "-W", "error::RuntimeWarning", "-c", first + BOTH]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "spon" not in done.stderr


def test_the_core_imports_no_host(tmp_path):
    code = """
import sys
for name in ("peft", "transformers", "vllm", "lm_eval", "typer", "rich", "matplotlib", "datasets"):
    sys.modules[name] = None  # importing it raises
import importlib, pkgutil, spon_plugin
for module in pkgutil.walk_packages(spon_plugin.__path__, "spon_plugin."):
    importlib.import_module(module.name)
"""
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)
