# SPDX-License-Identifier: Apache-2.0
"""`python -m spon_lm_eval ARGUMENTS`: `lm_eval ARGUMENTS`, where registration at start-up is switched off."""

import sys

from spon_lm_eval import register
from spon_plugin.errors import SponError


def main() -> None:
    """Run lm-eval's command line. Exit code 2 for wrong input of ours."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        sys.exit(f"error: spon_lm_eval needs {error.name}. Install it with: pip install 'spon-plugin[lm-eval]'")
    register()
    try:
        cli_evaluate()
    except SponError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
