# SPDX-License-Identifier: Apache-2.0
"""What a decoder block computes between its linears, for one token on a CPU, as stages of a program.

Each of PyTorch's small operators takes microseconds before it computes anything, and a block has some forty: on models
of some hundred million weights that is most of a token. All tensors are contiguous, on the CPU and, where nothing else
is said, of one dtype; only their addresses are kept.
"""

from __future__ import annotations

import functools
import struct
from typing import Any

import torch
from torch import Tensor

from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.kernels.cpu.block_layout import (
    ADD_FIELDS,
    ATTEND_FIELDS,
    DEVIATE_FIELDS,
    GATE_FIELDS,
    GATE_WORDS,
    NORM_FIELDS,
    attend_parts,
)
from spon_plugin.kernels.cpu.kernel import Stage

_NORM, _ATTEND = (struct.Struct(f"{len(fields) - 1}qd") for fields in (NORM_FIELDS, ATTEND_FIELDS))
_DEVIATE, _GATE, _ADD = (struct.Struct(f"{len(fields)}q") for fields in (DEVIATE_FIELDS, GATE_FIELDS, ADD_FIELDS))


@functools.cache
def _function(name: str, dtype: torch.dtype) -> tuple[Any, int]:
    """The compiled function of that name and its address."""
    from spon_plugin.kernels.cpu import block_worker

    compiled = getattr(block_worker, f"compile_{name}")(cpu.element(dtype))
    return compiled, compiled.address


def norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, total: Tensor, out: Tensor) -> Stage:
    """`block_reference.add_norm`, the results of which are `total`, if there is a `delta`, and `out`."""
    size = weight.shape[0]
    addresses = (x.data_ptr(), 0 if delta is None else delta.data_ptr(), weight.data_ptr())
    words = _NORM.pack(*addresses, total.data_ptr(), out.data_ptr(), x.numel() // size, size, eps)
    return Stage(_function("norm", x.dtype)[1], words)


def deviate(x: Tensor, center: Tensor, out: Tensor) -> Stage:
    """`masking.deviation` of x from a float32 `center`, the result of which is `out`."""
    words = _DEVIATE.pack(x.data_ptr(), center.data_ptr(), out.data_ptr(), x.numel())
    return Stage(_function("deviate", x.dtype)[1], words)


def add(one: Tensor, other: Tensor, out: Tensor) -> Stage:
    """``out = one + other``."""
    words = _ADD.pack(one.data_ptr(), other.data_ptr(), out.data_ptr(), one.numel())
    return Stage(_function("add", one.dtype)[1], words)


def gate_words(threads: int) -> int:
    """Words of 4 bytes of the scratch of `gate`."""
    return threads * GATE_WORDS


def gate(gate: Tensor, up: Tensor, out: Tensor, scratch: Tensor) -> Stage:
    """`block_reference.gated`, the result of which is `out`; `scratch` has `gate_words`."""
    words = _GATE.pack(*(tensor.data_ptr() for tensor in (gate, up, out, scratch)), gate.numel())
    return Stage(_function("gate", gate.dtype)[1], words)


def attend_words(threads: int, head_size: int, tokens: int) -> int:
    """Words of 4 bytes of the scratch of `attend`, for so many tokens in all."""
    return threads * attend_parts(head_size, tokens)[-1]


def attend(q: Tensor, k: Tensor, v: Tensor, head_size: int, scale: float, out: Tensor) -> Stage:
    """`block_reference.attend`, the result of which is `out`.

    Its fields `cos`, `sin`, `keys`, `values`, `capacity`, `length` and `scratch`, which has `attend_words`, are set
    before each run.
    """
    heads, kv_heads = q.numel() // head_size, k.numel() // head_size
    addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), 0, 0, 0, 0, out.data_ptr(), 0)
    sizes = (heads, kv_heads, head_size, 0, 0)
    words = _ATTEND.pack(*addresses, *sizes, cpu.barrier_of_programs(), scale)
    return Stage(_function("attend", q.dtype)[1], words)
