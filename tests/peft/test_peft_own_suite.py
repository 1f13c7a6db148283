# SPDX-License-Identifier: Apache-2.0
"""PEFT's own tests, run on SPON.

They ship in PEFT's sdist, which is downloaded with pip, in the installed version. To take them from elsewhere, name the
directory in ``PEFT_TESTS``. With what they print:

    pytest tests/peft/test_peft_own_suite.py -s
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
]


@pytest.fixture(scope="session")
def peft_tests(tmp_path_factory):
    staged = tmp_path_factory.mktemp("peft_suite")
    named = os.environ.get("PEFT_TESTS")
    source = Path(named) if named else _download(staged)
    package = staged / "peft_tests"
    package.mkdir()
    (package / "__init__.py").touch()
    for file in source.glob("*.py"):
        (package / file.name).symlink_to(file.absolute())
    return staged


def _download(directory):
    release = f"peft=={importlib.metadata.version('peft')}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=peft", release]
    subprocess.run(command, cwd=directory, check=True)
    (archive,) = directory.glob("peft-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    return directory / archive.name.removesuffix(".tar.gz") / "tests"


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_peft_suite(file, peft_tests):
    paths = [ROOT, ROOT / "integrations", Path(__file__).parent, peft_tests]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HOME": str(peft_tests / "hf_home"),
        "HF_HUB_OFFLINE": "1",
        "PYTEST_ADDOPTS": "",  # this run's options, such as its number of workers, are not that one's
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_suite_plugin", "-p", "no:cacheprovider", "--tb=short"]
    command += [f"--rootdir={peft_tests}", "-c", os.devnull, f"peft_tests/{file}"]
    run = subprocess.run(command, cwd=peft_tests, env=environment, capture_output=True, text=True)
    print(run.stdout[-5000:])
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-5000:]
