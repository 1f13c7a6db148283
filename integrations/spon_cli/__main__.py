# SPDX-License-Identifier: Apache-2.0
"""`python -m spon_cli`, the same as `spon`."""

from spon_cli import run

run()
