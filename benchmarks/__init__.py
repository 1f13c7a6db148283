# SPDX-License-Identifier: Apache-2.0
"""Measurements: each module is a command, and every figure in the README comes from one of them."""
