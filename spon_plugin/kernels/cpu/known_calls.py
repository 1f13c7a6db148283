# SPDX-License-Identifier: Apache-2.0
"""Calls of the CPU kernels that were checked before.

A decoding step makes hundreds of calls, and the small ones are done in less time than their arguments take to check.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from spon_plugin.kernels.cpu import kernel
from spon_plugin.kernels.cpu.scaled import Prepared
from spon_plugin.kernels.few_rows import CPU_ROWS
from spon_plugin.weights.scaled import ScaledWeight


class _Known(NamedTuple):
    codes: weakref.ref[Tensor]
    signature: tuple[Any, ...]
    call: Prepared


# One call for each weight and `exact`, under the identity of its codes, as long as they live: a draft and the model
# that verifies it take turns on one weight.
_known: dict[tuple[int, bool], _Known] = {}

# Calls on a matrix, under all that the kernel was told of its arguments: hosts pass another view of it every time.
_matrices: dict[tuple[Any, ...], kernel.Shards] = {}
_MOST = 1 << 14  # of them; then they begin anew


def recall(
    x: Tensor, parts: Any, threshold: Tensor, bias: Tensor | None, shard_sizes: Sequence[int] | None, exact: bool
) -> Prepared | None:
    """The call that `sparse_linear` made for the same arguments and another x; None where there is none for such an x.

    Args:
        x: has 1 to `CPU_ROWS` rows, if it is to be computed so.
        parts: has the tensors of a `ScaledWeight`, under the same names.
        threshold: as in `scaled.sparse_linear`, like the rest.
        bias: likewise.
        shard_sizes: likewise.
        exact: likewise.
    """
    known = _known.get((id(parts.codes), exact))
    if known is None or known.codes() is not parts.codes or not x.is_cpu:
        return None
    call = known.call
    if x.shape[-1:] != (call.in_features,) or not 0 < x.numel() <= CPU_ROWS * call.in_features:
        return None
    return call if known.signature == _signature(x, parts, threshold, bias, shard_sizes, exact) else None


def sparse_linear(
    x: Tensor,
    weight: ScaledWeight,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
    exact: bool = False,
) -> Tensor:
    """`scaled.sparse_linear`, whose arguments have been checked; `recall` finds the call the next time."""
    call = Prepared(weight, threshold, bias, shard_sizes=shard_sizes, exact=exact)
    if threshold.is_contiguous() and (bias is None or bias.is_contiguous()):  # else it reads copies, which grow old
        key = id(weight.codes), exact
        reference = weakref.ref(weight.codes, lambda _: _known.pop(key, None))
        _known[key] = _Known(reference, _signature(x, weight, threshold, bias, shard_sizes, exact), call)
    return call(x)


def recall_matrix(
    x: Tensor, weight_t: Tensor, threshold: Tensor, bias: Tensor | None, shard_sizes: Sequence[int] | None
) -> kernel.Shards | None:
    """`recall` for a matrix ``[in_features, out_features]``."""
    if not x.is_cpu:
        return None
    call = _matrices.get(_matrix_signature(x, weight_t, threshold, bias, shard_sizes))
    return call if call is not None and 0 < x.numel() <= CPU_ROWS * call.in_features else None


def sparse_linear_matrix(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
) -> Tensor:
    """`kernel.sparse_linear`, whose arguments have been checked; `recall_matrix` finds the call the next time."""
    if not threshold.is_contiguous() or not (bias is None or bias.is_contiguous()):  # it reads copies, which go
        return kernel.sparse_linear(x, weight_t, threshold, bias, shard_sizes=shard_sizes)
    if len(_matrices) >= _MOST:
        _matrices.clear()
    call = kernel.Shards(weight_t, threshold, bias, shard_sizes)
    _matrices[_matrix_signature(x, weight_t, threshold, bias, shard_sizes)] = call
    return call(x)


def _matrix_signature(
    x: Tensor, weight_t: Tensor, threshold: Tensor, bias: Tensor | None, shard_sizes: Sequence[int] | None
) -> tuple[Any, ...]:
    """Whatever the checks of a call depend on but the number of rows, and what the kernel is told."""
    return (
        x.dtype,
        x.shape[-1:],
        *_of(weight_t),
        *_of(threshold),
        bias if bias is None else _of(bias),
        shard_sizes if shard_sizes is None else tuple(shard_sizes),
    )


def _of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_cpu


def _signature(
    x: Tensor, parts: Any, threshold: Tensor, bias: Tensor | None, shard_sizes: Sequence[int] | None, exact: bool
) -> tuple[Any, ...]:
    """What the kernel was told of its arguments: addresses, and how to read them."""
    tensors = (parts.codes, parts.scales, parts.zeros, parts.offsets, parts.group_of_row, threshold, bias)
    return (
        *(tensor if tensor is None else _of(tensor) for tensor in tensors),
        parts.group_size,
        shard_sizes and tuple(shard_sizes),
        exact,
        x.dtype,
    )
