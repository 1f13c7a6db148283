# SPDX-License-Identifier: Apache-2.0
"""The masking rule of input sparsification, in one place.

`keep_i = |x_i| > threshold`, strictly, compared in float32 (TEAL, arXiv 2408.14690, section 4; SPON, arXiv 2512.12744,
eq. 2). Every kernel, host and calibration routine of the project follows this file.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from spon_plugin.errors import SponError

TokenMode = Literal["all", "decode"]
TOKEN_MODES: tuple[str, ...] = get_args(TokenMode)


def keep_mask(x: Tensor, threshold: Tensor) -> Tensor:
    """Which entries of a linear layer's input are kept.

    Args:
        x: ``[..., in_features]``, any floating dtype.
        threshold: float32 ``[1]`` (one threshold for the layer) or ``[in_features]`` (one per channel), not negative.
            It is a tensor with a dimension on purpose: a Python float or a 0-d tensor would be compared in `x.dtype`.

    Returns:
        bool ``[..., in_features]``, True where the entry is kept. NaN is kept, so that a broken activation stays
        visible in the output instead of being silently masked.
    """
    return ~(x.abs() <= threshold)


def sparsify(x: Tensor, threshold: Tensor, dense: Tensor | None = None) -> Tensor:
    """``S(x)``: `x` with the entries at or below the threshold set to zero.

    Args:
        x: ``[..., in_features]``, any floating dtype.
        threshold: float32 ``[1]`` or ``[in_features]``; see `keep_mask`.
        dense: bool with `x`'s leading shape ``[...]``, True for tokens that keep their whole input; None for none.

    Returns:
        ``[..., in_features]`` in `x.dtype`. The gradient flows through the kept entries.
    """
    keep = keep_mask(x, threshold)
    if dense is not None:
        keep = keep | dense.unsqueeze(-1)
    return torch.where(keep, x, 0)


def check_sparsity(sparsity: float, field: str = "sparsity") -> float:
    """Return `sparsity` as a float if it lies in [0, 1).

    Raises:
        SponError: it does not.
    """
    try:
        value = float(sparsity)
    except (TypeError, ValueError):
        value = -1.0
    if isinstance(sparsity, bool) or not 0.0 <= value < 1.0:
        raise SponError.of(field, sparsity, "a number in [0, 1), the share of inputs to zero", "Try 0.5.")
    return value
