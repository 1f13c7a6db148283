# SPDX-License-Identifier: Apache-2.0
"""The masking rule of input sparsification, in one place.

`keep_i = |x_i - center_i| > threshold_i`, strictly, compared in float32. The centre is 0 and the threshold one number
per layer in TEAL (arXiv 2408.14690, section 4) and SPON (arXiv 2512.12744, eq. 2); WINA (arXiv 2505.19427) has a
threshold per channel, and SCAP (arXiv 2412.07174) a centre, which takes the place of what is masked. Every kernel, host
and calibration routine of the project follows this file.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from spon_plugin.errors import SponError

TokenMode = Literal["all", "decode"]
TOKEN_MODES: tuple[str, ...] = get_args(TokenMode)


def deviation(x: Tensor, center: Tensor | None) -> Tensor:
    """``x - center`` in `x.dtype`: what is compared, and what a kernel multiplies where ``W center`` is in the bias.

    The difference is taken in float32 and rounded once. It is compared as rounded, because that is the tensor that a
    kernel receives: so an entry near the threshold is masked in all implementations or in none.

    Args:
        x: ``[..., in_features]``, any floating dtype.
        center: float32 ``[in_features]``, or None for 0, which gives `x` itself.
    """
    return x if center is None else (x - center).to(x.dtype)


def keep_mask(x: Tensor, threshold: Tensor, center: Tensor | None = None) -> Tensor:
    """Which entries of a linear layer's input are kept.

    Args:
        x: ``[..., in_features]``, any floating dtype.
        threshold: float32 ``[1]`` (one threshold for the layer) or ``[in_features]`` (one per channel), not negative.
            It is a tensor with a dimension on purpose: a Python float or a 0-d tensor would be compared in `x.dtype`.
        center: float32 ``[in_features]``, the value that distances are measured from; None for 0.

    Returns:
        bool ``[..., in_features]``, True where the entry is kept. NaN is kept, so that a broken activation stays
        visible in the output instead of being silently masked.
    """
    return ~(deviation(x, center).abs() <= threshold)


def sparsify(x: Tensor, threshold: Tensor, dense: Tensor | None = None, center: Tensor | None = None) -> Tensor:
    """``S(x)``: `x` with the entries that are masked set to the centre, which is 0 where there is none.

    Args:
        x: ``[..., in_features]``, any floating dtype.
        threshold: float32 ``[1]`` or ``[in_features]``; see `keep_mask`.
        dense: bool with `x`'s leading shape ``[...]``, True for tokens that keep their whole input; None for none.
        center: float32 ``[in_features]`` or None; see `keep_mask`.

    Returns:
        ``[..., in_features]`` in `x.dtype`. The gradient flows through the kept entries.
    """
    keep = keep_mask(x, threshold, center)
    if dense is not None:
        keep = keep | dense.unsqueeze(-1)
    return zero_dropped(x, keep) if center is None else torch.where(keep, x, center.to(x.dtype))


def sparse_deviation(x: Tensor, threshold: Tensor, dense: Tensor | None = None, center: Tensor | None = None) -> Tensor:
    """``S(x) - center``, which is zero where masked: the input of a layer that has ``W center`` in its bias.

    Hosts compute ``W sparse_deviation(x) + [b + W (center + alpha)]`` rather than ``W S(x) + b + W alpha``: the bias is
    folded in float32, whereas the centres in `S(x)` are rounded to `x.dtype`, alike for every token.

    Args:
        x: as in `sparsify`.
        threshold: likewise.
        dense: likewise. These tokens are returned whole, without the centre taken off: they go with the bias `b`.
        center: likewise. Without one this is `sparsify`.

    Returns:
        ``[..., in_features]`` in `x.dtype`. The gradient flows through the kept entries.
    """
    if center is None:
        return sparsify(x, threshold, dense)
    return choose_rows(dense, x, sparsify(deviation(x, center), threshold))


def zero_dropped(x: Tensor, keep: Tensor) -> Tensor:
    """``torch.where(keep, x, 0)``, differentiable in `x`.

    On a CPU `torch.where` is not vectorized and takes ten times as long as a product, a quarter of a training step. The
    product differs for a dropped infinity or NaN only, and no finite threshold drops one; a dropped entry may be -0.

    Args:
        x: any floating dtype.
        keep: bool, of `x`'s shape or one that broadcasts to it.

    Returns:
        In `x`'s shape and dtype.
    """
    return x * keep.view(torch.int8) if _on_cpu(x) else torch.where(keep, x, 0)


def choose_rows(dense: Tensor | None, x: Tensor, otherwise: Tensor) -> Tensor:
    """`x` for dense tokens and `otherwise` for the others, differentiable in both.

    Args:
        dense: bool with the leading shape ``[...]``, or None for no dense token.
        x: ``[..., features]``.
        otherwise: likewise.
    """
    if dense is None:
        return otherwise
    if _on_cpu(x):  # they are few: copied one by one rather than with a `where` over all
        dense = dense.expand(otherwise.shape[:-1])
        return otherwise.index_put((dense,), x[dense])
    return torch.where(dense.unsqueeze(-1), x, otherwise)


def _on_cpu(x: Tensor) -> bool:
    """Whether eager CPU kernels run; a compiler makes its own loops."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


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
