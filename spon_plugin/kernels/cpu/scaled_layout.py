# SPDX-License-Identifier: Apache-2.0
"""What the caller of the CPU kernels for weights with scales and their threads agree on; see `layout`."""

from __future__ import annotations

from spon_plugin.kernels.cpu.layout import BLOCK

# The arguments of the compiled functions travel as one array of 64-bit words: those of a call, then those of a weight.
# A `*_kind` says what lies at an address.
WEIGHT_FIELDS = (
    "codes", "code_stride", "scales", "scale_kind", "scale_stride", "zeros", "zero_kind", "zero_stride",
    "offsets", "offset_kind", "offset_stride", "group_of_row", "group_size", "groups", "in_features", "out_features",
)  # fmt: skip
CALL_FIELDS = ("x", "x_kind", "y", "batch", "tile", "thread_words", "scratch", "barrier")
LAYER_FIELDS = ("threshold", "per_channel", "bias", "bias_kind", "y_stride")
FIELDS = (*CALL_FIELDS, *WEIGHT_FIELDS, *LAYER_FIELDS)
(
    X, X_KIND, Y, BATCH, TILE, THREAD_WORDS, SCRATCH, BARRIER,
    CODES, CODE_STRIDE, SCALES, SCALE_KIND, SCALE_STRIDE, ZEROS, ZERO_KIND, ZERO_STRIDE,
    OFFSETS, OFFSET_KIND, OFFSET_STRIDE, GROUP_OF_ROW, GROUP_SIZE, GROUPS, IN_FEATURES, OUT_FEATURES,
    THRESHOLD, PER_CHANNEL, BIAS, BIAS_KIND, Y_STRIDE,
) = range(len(FIELDS))  # fmt: skip
# To decode rows: where to, the first of them, how many, and as many words as a call has in all.
DECODE_FIELDS = ("out", "first", "rows", "", "", "", "decode_scratch", "", *WEIGHT_FIELDS)
OUT, FIRST_ROW, ROW_COUNT = range(3)

# Kinds of elements.
NOTHING, FLOAT32, BFLOAT16, FLOAT16, INT8, UINT8, INT16, INT32 = range(8)

# How codes are summed: as float32 (int8, FP8 and four bits exactly), or four bits in integers on inputs of eight bits.
# The latter by the instructions of `int4_dot_vnni` and `int4_dot`, or in plain code.
SUM_INT8, SUM_FP8, SUM_INT4_EXACT = "int8", "fp8", "int4-exact"
SUM_INT4_AVX512_VNNI, SUM_INT4_AVX_VNNI, SUM_INT4_AVX2 = "int4-avx512vnni", "int4-avxvnni", "int4-avx2"
SUM_INT4_PORTABLE = "int4-portable"
VECTORS = (SUM_INT4_AVX512_VNNI, SUM_INT4_AVX_VNNI, SUM_INT4_AVX2)
INTEGERS = (*VECTORS, SUM_INT4_PORTABLE)

RUN = 128  # inputs that are rounded to eight bits in one go, at most
# Rows of four-bit codes read at once, whose inputs share a step: the sum of as many products fits into 16 bits.
ROWS = 16


def scratch_parts(batch: int, in_features: int, groups: int, outputs: int) -> tuple[int, ...]:
    """Where a thread's own part of the scratch holds what, in words of 4 bytes.

    Args:
        batch: rows of x.
        in_features: length of an input.
        groups: groups of inputs that share scales.
        outputs: outputs of a tile.

    Returns:
        The starts of addresses of active rows (int64, with `ROWS` to spare); x and kept values ``[batch, in_features]``
        (float32); flags, indices and another order of active inputs (int32, with `ROWS` to spare); their counts by
        block; places by group; scales, zero points and offsets of a tile (float32 ``[outputs]``); sums ``[batch,
        outputs]``; inputs of eight bits (int32 ``[batch, RUN]``), pairs of them (int16) and their steps (``[batch,
        RUN / ROWS]``); totals ``[2, batch]``; and the size of all.
    """
    blocks = (in_features + BLOCK - 1) // BLOCK
    x = 2 * (in_features + ROWS)
    values = x + batch * in_features
    active = values + batch * in_features
    index = active + in_features
    order = index + in_features + ROWS
    counts = order + in_features + ROWS
    places = counts + blocks
    scale = places + groups + 1
    sums = scale + 3 * outputs
    rounded = sums + batch * outputs
    pairs = rounded + batch * RUN
    steps = pairs + batch * RUN // 2
    totals = steps + batch * RUN // ROWS
    size = (totals + 2 * batch + 15) // 16 * 16
    return 0, x, values, active, index, order, counts, places, scale, sums, rounded, pairs, steps, totals, size
