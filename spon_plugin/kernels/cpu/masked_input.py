# SPDX-License-Identifier: Apache-2.0
"""Inputs of many tokens masked in one pass, and their gradients in another, on the threads that torch has."""

from __future__ import annotations

import functools
import struct
from typing import Any

import torch
from torch import Tensor

from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.machine import DTYPES


@functools.lru_cache(maxsize=len(DTYPES))
def _workers(dtype: torch.dtype) -> tuple[Any, Any]:
    from spon_plugin.kernels.cpu import masked_input_worker as compiled

    element = cpu.element(dtype)
    return compiled.compile_forward(element), compiled.compile_backward(element)


def _run(worker: Any, *words: int) -> None:
    packed = struct.pack(f"{len(words)}q", *words)
    cpu.parallel()(worker.address, packed, torch.get_num_threads(), 0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def forward(
    x: Tensor, threshold: Tensor, center: Tensor | None, shift: Tensor | None, dense: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `kernels.masked_input`; all of it contiguous, the vectors float32.

    Returns:
        The masked input, and bool, what was kept.
    """
    out, keep = torch.empty_like(x), torch.empty(x.shape, dtype=torch.bool)
    in_features = x.shape[-1]
    addresses = [_address(tensor) for tensor in (x, threshold, center, shift, dense, out, keep)]
    _run(_workers(x.dtype)[0], *addresses, x.numel() // max(1, in_features), in_features, int(threshold.numel() > 1))
    return out, keep


def backward(grad: Tensor, keep: Tensor, dense: Tensor | None, with_shift: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of the input and of the shift.

    Args:
        grad: ``[..., in_features]``, contiguous.
        keep: bool of that shape.
        dense: bool ``[...]`` or None.
        with_shift: whether the shift's is asked for.
    """
    out, in_features = torch.empty_like(grad), grad.shape[-1]
    # Zeros: OpenMP may give fewer threads than are asked for (OMP_DYNAMIC, OMP_THREAD_LIMIT).
    sums = torch.zeros(torch.get_num_threads(), in_features) if with_shift else None
    addresses = [_address(tensor) for tensor in (grad, keep, dense, out, sums)]
    _run(_workers(grad.dtype)[1], *addresses, grad.numel() // max(1, in_features), in_features)
    return out, None if sums is None else sums.sum(0)
