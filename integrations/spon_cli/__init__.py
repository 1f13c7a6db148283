# SPDX-License-Identifier: Apache-2.0
"""The command line `spon`."""

import os
import signal
import sys
from types import FrameType


def run() -> None:
    """Run the command line, or say what to install."""
    signal.signal(signal.SIGTERM, _stop)
    # tqdm reads it when it is imported: the bars of libraries (GGUF, compressed-tensors) would run across ours.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from spon_cli.main import main
    except ModuleNotFoundError as error:
        sys.exit(f"error: spon needs {error.name}. Install it with: pip install 'spon-plugin[cli]'")
    except KeyboardInterrupt:
        sys.exit(130)
    main()


def _stop(number: int, _frame: FrameType | None) -> None:
    """End as on an interrupt, so that nothing half-written stays: `timeout` and batch systems send SIGTERM."""
    sys.exit(128 + number)
