# SPDX-License-Identifier: Apache-2.0
"""A layer's weight, unpacked once: for whoever asks for it again and again, as training does."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.weights.linears import weight_of
from spon_plugin.weights.opaque import Opaque
from spon_plugin.weights.row_weight import RowWeight
from spon_plugin.weights.scaled import ScaledWeight


class KeptWeight:
    """`weight_of` one layer, which keeps what had to be unpacked (words of GPTQ, AWQ, compressed-tensors; GGUF blocks).

    It takes the memory of the codes once more. Weights that are views of the layer's tensors are not kept, and what is
    kept is dropped as soon as a tensor of the layer is another, lies elsewhere or has been written to (other than
    through its `data`, which torch does not count). Copies and pickles of the layer start afresh.
    """

    __slots__ = ("_kept", "_seen", "_tensors")

    def __init__(self) -> None:
        self._seen: list[Any] = []
        self._tensors: list[Tensor] = []  # held, so that no other can have the identity of one
        self._kept: ScaledWeight | None = None

    def __reduce__(self) -> tuple[type[KeptWeight], tuple[()]]:
        return KeptWeight, ()

    def of(self, module: nn.Module, dtype: torch.dtype | None = None) -> RowWeight | Opaque:
        """See `weight_of`.

        Args:
            module: always the same one.
            dtype: as there.
        """
        if torch.compiler.is_compiling():
            return weight_of(module, dtype)
        own = chain(module._parameters.values(), module._buffers.values())
        tensors = [tensor for tensor in own if tensor is not None]
        seen = [_state(tensor) for tensor in tensors]
        if self._kept is None or seen != self._seen:
            self._kept = None
            found = weight_of(module, dtype)
            if not isinstance(found, ScaledWeight) or None in seen or _lies_in(found.codes, tensors):
                return found
            self._kept, self._seen, self._tensors = found, seen, tensors
        return self._kept


def _state(tensor: Tensor) -> tuple[Any, ...] | None:
    """What changes when a tensor's values may have; None where nobody can tell."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
        return None
    return id(tensor), tensor.data_ptr(), tensor._version, tensor.device


def _lies_in(codes: Tensor, tensors: list[Tensor]) -> bool:
    place = codes.untyped_storage().data_ptr()
    return any(place == tensor.untyped_storage().data_ptr() for tensor in tensors)
