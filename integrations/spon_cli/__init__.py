# SPDX-License-Identifier: Apache-2.0
"""The command line `spon`."""

import sys


def run() -> None:
    """Run the command line, or say what to install."""
    try:
        from spon_cli.main import main
    except ModuleNotFoundError as error:
        sys.exit(f"error: spon needs {error.name}. Install it with: pip install 'spon-plugin[cli]'")
    main()
