# SPDX-License-Identifier: Apache-2.0
"""Measured comparisons: plans, rows that are kept, evaluation, tables."""
