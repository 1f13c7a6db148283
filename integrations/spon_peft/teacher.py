# SPDX-License-Identifier: Apache-2.0
"""What the dense model says of a batch, kept for the epochs in which the batch's rows come again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

TEACHER_BYTES = 2 << 30
"""How much may be kept by default: a million tokens of 512 channels in float32."""


class TeacherStates:
    """The dense model's states (or logits) at the tokens that count, by the rows that they are of.

    They are kept on the CPU until `limit` bytes are reached; rows beyond that are computed every time. The dense model
    has to stay the same.

    Args:
        limit: in bytes.
    """

    def __init__(self, limit: int = TEACHER_BYTES) -> None:
        self.limit, self.nbytes = limit, 0
        self._kept: dict[bytes, Tensor] = {}

    def of(self, inputs: Mapping[str, Any], counted: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """What `run` gives, without running it where every row is known.

        Args:
            inputs: of the forward pass.
            counted: bool ``[batch, sequence]``, the tokens that `run` gives states of, row by row.
            run: the dense model's pass, ``[tokens that count, features]``.
        """
        keys = _keys(inputs, counted)
        if keys is None or not len(keys):
            return run()
        known = [self._kept.get(key) for key in keys]
        if all(states is not None for states in known):
            return torch.cat([states for states in known if states is not None]).to(counted.device)
        # The whole batch, and not the rows that are missing: a run that goes on from a checkpoint has the same bits.
        computed = run()
        for key, states in zip(keys, computed.split(counted.sum(-1).tolist()), strict=True):
            size = states.numel() * states.element_size()
            if key not in self._kept and self.nbytes + size <= self.limit:
                self._kept[key] = states.detach().to("cpu", copy=True)
                self.nbytes += size
        return computed


def _keys(inputs: Mapping[str, Any], counted: Tensor) -> list[bytes] | None:
    """What tells each row from all others; None where an input has no rows of its own."""
    tensors = {"counted": counted, **{name: value for name, value in inputs.items() if value is not None}}
    rows = len(counted)
    digests = [hashlib.sha256() for _ in range(rows)]
    for name, value in sorted(tensors.items()):
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != rows:
            return None
        values = value.detach().cpu().contiguous().view(rows, -1).view(torch.uint8).numpy()
        for digest, row in zip(digests, values, strict=True):
            digest.update(f"{name} {value.dtype} {tuple(value.shape[1:])} ".encode() + row.tobytes())
    return [digest.digest() for digest in digests]
