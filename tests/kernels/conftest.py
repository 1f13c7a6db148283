# SPDX-License-Identifier: Apache-2.0
"""Triton kernels run natively where CUDA is available, and under Triton's interpreter, on the CPU, elsewhere."""

import sys

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def import_interpreted() -> None:
    """Import our kernels so that Triton interprets them.

    Triton decides when a kernel is decorated, its own library included, and transformers has imported it by now. So it
    is imported once more, but for its compiled extension, which a process can load only once.
    """
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" and "._C" not in name]:
        del sys.modules[name]
    import spon_plugin.kernels.triton.compaction
    import spon_plugin.kernels.triton.dense_mask
    import spon_plugin.kernels.triton.scaled
    import spon_plugin.kernels.triton.scaled_compaction  # noqa: F401


if INTERPRETED:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        try:
            import_interpreted()
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton asks at the first launch again. Set for these tests only, so that other tests' processes do not see it."""
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    return DEVICE
