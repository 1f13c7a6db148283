# SPDX-License-Identifier: Apache-2.0
"""Calls of the CPU kernel for weights with scales that were checked before.

A decoding step makes hundreds of calls, and the small ones are done in less time than their arguments take to check.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from spon_plugin.kernels.cpu.scaled import Prepared
from spon_plugin.kernels.few_rows import CPU_ROWS
from spon_plugin.weights.scaled import ScaledWeight


class _Known(NamedTuple):
    """A call, and the arguments that it was made for.

    Attributes:
        codes: of the weight.
        tensors: the others, as `_tensors` has them; held, so that nothing else is at their place.
        addresses: of all of them.
        signature: what has to be the same where the tensors are other objects.
        rest: what has to be the same besides.
        call: does it.
    """

    codes: weakref.ref[Tensor]
    tensors: tuple[Tensor | None, ...]
    addresses: tuple[int, ...]
    signature: tuple[Any, ...]
    rest: tuple[Any, ...]
    call: Prepared


# One call for each weight and `exact`, under the identity of its codes, as long as they live: a draft and the model
# that verifies it take turns on one weight.
_known: dict[tuple[int, bool], _Known] = {}


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
    if known is None or not x.is_cpu:
        return None
    codes = known.codes()
    if codes is None or codes is not parts.codes:
        return None
    call, rest = known.call, (x.dtype, shard_sizes and tuple(shard_sizes))
    if rest != known.rest or x.shape[-1] != call.in_features or not 0 < x.numel() <= CPU_ROWS * call.in_features:
        return None
    tensors = _tensors(parts, threshold, bias)
    # Past what the tensors are like, which takes as long to ask as a small layer takes to read.
    same = all(map(operator.is_, tensors, known.tensors)) and _addresses(codes, tensors) == known.addresses
    return call if same or _signature(codes, tensors) == known.signature else None


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
        tensors = _tensors(weight, threshold, bias)
        addresses, signature = _addresses(weight.codes, tensors), _signature(weight.codes, tensors)
        rest = x.dtype, shard_sizes and tuple(shard_sizes)
        _known[key] = _Known(reference, tensors, addresses, signature, rest, call)
    return call(x)


def _tensors(parts: Any, threshold: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """What the kernel was told of, but for the codes."""
    return threshold, bias, parts.scales, parts.zeros, parts.offsets, parts.group_of_row


def _addresses(codes: Tensor, tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return (codes.data_ptr(), *[0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def _signature(codes: Tensor, tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """What the kernel was told of its arguments: addresses, and how to read them."""
    told = [
        None if tensor is None else (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        for tensor in (codes, *tensors)
    ]
    return tuple(told)
