# SPDX-License-Identifier: Apache-2.0
"""What the caller of the CPU kernel for many rows and its threads agree on; see `layout`."""

from __future__ import annotations

from spon_plugin.kernels.cpu import scaled_layout

# The words of `scaled_layout`, whatever the weight, and these.
FIELDS = (*scaled_layout.FIELDS, "code_kind", "code_bits", "padded", "strips")
CODE_KIND, CODE_BITS, PADDED, STRIPS = range(len(scaled_layout.FIELDS), len(FIELDS))
# Kinds of codes, besides those of elements.
CODE_FLOAT8, CODE_NIBBLES = 8, 9

DEPTH, PANEL = 128, 512
"""Inputs and outputs of a panel."""
GAP = 1
"""Rows between the strips of a panel, which would otherwise share the same sets of the first cache."""


def padded(rows: int) -> int:
    """`rows`, or the next number that blocks of 4 to 6 make up."""
    return max(rows, 4) if rows != 7 else 8


def blocks(rows: int) -> int:
    """How many blocks of 4 to 6 rows make up `rows`, evenly."""
    return (rows + 5) // 6


def scratch_parts(rows: int, strips: int, columns: int) -> tuple[int, int, int, int, int, int]:
    """Where a thread's own part of the scratch holds what, in words of 4 bytes.

    Args:
        rows: of x, `padded`.
        strips: whose sums are made at once.
        columns: outputs of a strip.

    Returns:
        The starts of the panel, its scales ``[3, PANEL]``, a row of inputs or outputs, the bias, the sums; and the size
        of all.
    """
    scales = (DEPTH + GAP) * PANEL
    row = scales + 3 * PANEL
    bias = row + max(DEPTH, strips * columns)
    sums = bias + (strips * columns + 15) // 16 * 16
    return 0, scales, row, bias, sums, (sums + strips * rows * columns + 15) // 16 * 16


BF16_DEPTH, BF16_PANEL = 512, 256
"""Inputs and outputs of a panel of bfloat16."""
BF16_ROWS, BF16_STEP, BF16_COLUMNS = 16, 32, 32
"""Rows of x in a tile, inputs that a tile multiplies at once, and outputs of a strip: two tiles."""


def bf16_padded(rows: int) -> int:
    """`rows`, or the next number that tiles make up."""
    return (rows + BF16_ROWS - 1) // BF16_ROWS * BF16_ROWS


def bf16_scratch_parts(rows: int, in_features: int, strips: int) -> tuple[int, int, int, int, int, int, int]:
    """`scratch_parts` for panels of bfloat16.

    Args:
        rows: of x, `bf16_padded`.
        in_features: length of a row.
        strips: whose sums are made at once.

    Returns:
        The size of what the threads share, x; in a thread's own part, which begins with the panel, the starts of scales
        ``[2, 3, PANEL]``, a strip's row of decoded weights, a row of outputs, the bias, and the sums; and the size of
        the own part.
    """
    steps, columns = (in_features + BF16_STEP - 1) // BF16_STEP, strips * BF16_COLUMNS
    shared = (rows * steps * BF16_STEP // 2 + 15) // 16 * 16
    scales = BF16_DEPTH * BF16_PANEL // 2
    rest = scales + 6 * PANEL
    row = rest + BF16_COLUMNS
    bias = row + columns
    sums = bias + columns
    return shared, scales, rest, row, bias, sums, sums + rows * columns
