# SPDX-License-Identifier: Apache-2.0
"""What the caller of the block's compiled functions and these agree on; see `layout`."""

from __future__ import annotations

# A double, `eps` and `scale`, travels as its bits.
NORM_FIELDS = ("x", "delta", "weight", "total", "out", "rows", "size", "eps")
X, DELTA, WEIGHT, TOTAL, OUT, ROWS, SIZE, EPS = range(len(NORM_FIELDS))
DEVIATE_FIELDS = ("x", "center", "deviation", "features")
_, CENTER, DEVIATION, FEATURES = range(len(DEVIATE_FIELDS))
ADD_FIELDS = ("one", "other", "sum", "length_of_sum")
ONE, OTHER, SUM, LENGTH_OF_SUM = range(len(ADD_FIELDS))
GATE_FIELDS = ("gate", "up", "product", "gate_scratch", "gate_features")
GATE, UP, PRODUCT, GATE_SCRATCH, GATE_FEATURES = range(len(GATE_FIELDS))
ATTEND_FIELDS = (
    "q", "k", "v", "cos", "sin", "keys", "values", "attended", "scratch",
    "heads", "kv_heads", "head_size", "capacity", "length", "barrier", "scale",
)  # fmt: skip
(
    Q, K, V, COS, SIN, KEYS, VALUES, ATTENDED, SCRATCH,
    HEADS, KV_HEADS, HEAD_SIZE, CAPACITY, LENGTH, BARRIER, SCALE,
) = range(len(ATTEND_FIELDS))  # fmt: skip

GATE_TILE = 512  # outputs of the gate at a time
GATE_WORDS = 2 * GATE_TILE  # of a thread's own part of its scratch, 4 bytes each: numbers, and powers of two


def attend_parts(head_size: int, tokens: int) -> tuple[int, int, int, int]:
    """Where a thread's own part of the scratch of the attention holds what, in words of 4 bytes.

    Args:
        head_size: length of a key.
        tokens: attended to.

    Returns:
        The starts of a head's sums (float32 ``[head_size]``, behind a query of that length), of probabilities (float32
        ``[tokens]``) and of powers of two (int32 ``[tokens]``); and the size of all, in whole cache lines.
    """
    scores = 2 * head_size
    powers = scores + tokens
    return head_size, scores, powers, (powers + tokens + 15) // 16 * 16
