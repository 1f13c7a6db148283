# SPDX-License-Identifier: Apache-2.0
"""What the caller of the CPU kernel for many rows and its threads agree on; see `layout`."""

from __future__ import annotations

from spon_plugin.kernels.cpu import scaled_layout

# The words of `scaled_layout`, whatever the weight, and these.
FIELDS = (*scaled_layout.FIELDS, "code_kind", "code_bits", "padded", "strips")
CODE_KIND, CODE_BITS, PADDED, STRIPS = range(len(scaled_layout.FIELDS), len(FIELDS))
# Kinds of codes, besides those of elements.
CODE_FLOAT8, CODE_NIBBLES = 8, 9

DEPTH = 128
"""Inputs of a panel."""
GAP = 1
"""Rows between the strips of a panel, which would otherwise share the same sets of the first cache."""


def padded(rows: int) -> int:
    """`rows`, or the next number that blocks of 4 to 6 make up."""
    return max(rows, 4) if rows != 7 else 8


def blocks(rows: int) -> int:
    """How many blocks of 4 to 6 rows make up `rows`, evenly."""
    return (rows + 5) // 6


def scratch_parts(rows: int, strips: int, columns: int, panel: int) -> tuple[int, int, int, int, int, int]:
    """Where a thread's own part of the scratch holds what, in words of 4 bytes.

    Args:
        rows: of x, `padded`.
        strips: whose sums are made at once.
        columns: outputs of a strip.
        panel: outputs of a panel.

    Returns:
        The starts of the panel, its scales ``[3, panel]``, a row of inputs or outputs, the bias, the sums; and the size
        of all.
    """
    scales = (DEPTH + GAP) * panel
    row = scales + 3 * panel
    bias = row + max(DEPTH, strips * columns)
    sums = bias + (strips * columns + 15) // 16 * 16
    return 0, scales, row, bias, sums, (sums + strips * rows * columns + 15) // 16 * 16
