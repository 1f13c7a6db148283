# SPDX-License-Identifier: Apache-2.0
"""Rows of a weight with scales as float32, on a CPU: what `ScaledWeight.rows` gives, in one pass."""

from __future__ import annotations

import functools
import struct
from typing import Any

import torch
from torch import Tensor

from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.kernels.cpu.scaled import weight_words
from spon_plugin.kernels.cpu.scaled_layout import CALL_FIELDS
from spon_plugin.weights.fp8 import Fp8Weight
from spon_plugin.weights.scaled import ScaledWeight

_CALL = struct.Struct(f"{len(CALL_FIELDS)}q")


@functools.cache
def _worker(kind: str, unit: int) -> tuple[Any, int]:
    from spon_plugin.kernels.cpu import numba_types
    from spon_plugin.kernels.cpu.decode_worker import compile_decode_worker

    code = numba_types.INT8 if unit == 1 and kind != Fp8Weight.format else numba_types.FLOAT8
    compiled = compile_decode_worker(code, unit == 1)
    return compiled, compiled.address


def rows(weight: ScaledWeight, first: int, stop: int) -> Tensor:
    """The rows from `first` to `stop`, float32 ``[stop - first, out_features]``.

    Args:
        weight: one that `scaled.why_not` has nothing against.
        first: an input.
        stop: another, behind it.
    """
    stop, threads = min(stop, weight.in_features), torch.get_num_threads()
    out = torch.empty((stop - first, weight.out_features), dtype=torch.float32)
    scratch = cpu.scratch(threads * -(-3 * weight.out_features // 16) * 16)
    call = _CALL.pack(out.data_ptr(), first, stop - first, 0, 0, 0, scratch.data_ptr(), 0)
    words = call + weight_words(weight, 0, weight.out_features)
    cpu.parallel()(_worker(weight.format, weight.unit)[1], words, threads, 0)
    return out
