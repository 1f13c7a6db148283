# SPDX-License-Identifier: Apache-2.0
"""What the CPU kernel's caller and its compiled threads agree on: the words of a call, and the parts of the scratch."""

from __future__ import annotations

# The arguments of the compiled function travel as one array of 64-bit words.
FIELDS = (
    "x", "weight_t", "threshold", "bias", "y", "scratch",
    "batch", "in_features", "out_features", "row_stride", "per_channel", "bias_kind",
)  # fmt: skip
(X, WEIGHT_T, THRESHOLD, BIAS, Y, SCRATCH, BATCH, IN_FEATURES, OUT_FEATURES, ROW_STRIDE, PER_CHANNEL, BIAS_KIND) = (
    range(len(FIELDS))
)
NO_BIAS, BIAS_FLOAT32, BIAS_ELEMENT = 0, 1, 2

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
    """Words of 4 bytes: the sums ``[threads, batch, out_features]`` (float32), then every thread's own part."""
    return threads * (batch * out_features + thread_parts(batch, in_features)[4])
