# SPDX-License-Identifier: Apache-2.0
"""What the CPU kernel's caller and its compiled threads agree on: the words of a call, and the parts of the scratch."""

from __future__ import annotations

# The arguments of the compiled function travel as one array of 64-bit words: those of a call, then those of each of the
# weights that are multiplied in it.
CALL_FIELDS = ("x", "threshold", "scratch", "batch", "in_features", "per_channel", "weights", "barrier")
WEIGHT_FIELDS = ("weight_t", "bias", "y", "out_features", "row_stride", "bias_kind")
X, THRESHOLD, SCRATCH, BATCH, IN_FEATURES, PER_CHANNEL, WEIGHTS, BARRIER = range(len(CALL_FIELDS))
WEIGHT_T, BIAS, Y, OUT_FEATURES, ROW_STRIDE, BIAS_KIND = range(len(WEIGHT_FIELDS))
NO_BIAS, BIAS_FLOAT32, BIAS_ELEMENT = 0, 1, 2

# Words of a program before its stages: how many there are, and the address of their barrier.
HEAD = 2

BLOCK = 256  # inputs per count; a thread finds its share of the active list by blocks


def thread_parts(batch: int, in_features: int) -> tuple[int, int, int, int, int]:
    """Where a thread's own part of the scratch holds what, in words of 4 bytes.

    Returns:
        The starts of values ``[batch, in_features]`` (float32), flags and indices of active inputs ``[in_features]``,
        and their counts by block (int32); and the size of all.
    """
    active = batch * in_features
    counts = active + 2 * in_features
    return 0, active, active + in_features, counts, counts + (in_features + BLOCK - 1) // BLOCK


def scratch_size(threads: int, batch: int, in_features: int, out_features: int) -> int:
    """Words of 4 bytes: the sums ``[threads, batch, out_features]`` (float32), then every thread's own part.

    Several weights have their sums one after the other; `out_features` is that of all.
    """
    return threads * (batch * out_features + thread_parts(batch, in_features)[4])
