# SPDX-License-Identifier: Apache-2.0
"""`sparse_linear` for the layers of a model that decodes on a CPU, with a layer's arguments checked once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.kernels.arguments import is_plain
from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.kernels.few_rows import CPU_ROWS


class LayerCall:
    """Calls the CPU kernel for one layer.

    A decoding step passes hundreds of layers, and the small ones are done in less time than their arguments take to
    check. What does not depend on x is therefore settled at the first call, and again whenever the layer's tensors lie
    elsewhere. Copies and pickles of the layer settle for themselves.
    """

    __slots__ = ("_call", "_state", "_tensors")

    def __init__(self) -> None:
        self._tensors: tuple[Any, ...] = ()
        self._state: tuple[Any, ...] = ()  # where they lie, and how
        self._call: cpu.Prepared | None = None

    def __reduce__(self) -> tuple[type[LayerCall], tuple[()]]:
        return LayerCall, ()

    def __call__(self, layer: nn.Module, x: Tensor, threshold: Tensor) -> Tensor | None:
        """The output of `layer` for `x` ``[..., in_features]``; None where `sparse_linear` itself has to be called.

        Args:
            layer: has a `weight_t` ``[in_features, out_features]``, and a `bias` or None.
            x: its input.
            threshold: see `kernels.sparse_linear`.
        """
        # Past the lookups of `nn.Module`, each of which takes half a microsecond.
        parameters = layer._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        if not is_plain(x, weight, bias) or torch.is_autocast_enabled("cpu"):
            return None
        addresses = (weight.data_ptr(), 0 if bias is None else bias.data_ptr(), threshold.data_ptr())
        state = (*addresses, weight.stride(), threshold.shape)
        if state != self._state:
            # Held, so that while the kernel knows an address nothing else can lie there.
            self._tensors = (weight, bias, threshold)
            self._call = cpu.prepare([layer.weight_t], threshold, [bias])  # type: ignore[list-item]
            self._state = state  # last: another Python thread may be reading
        call = self._call
        if call is None or x.dtype is not call.dtype or not x.is_cpu or x.shape[-1:] != (call.in_features,):
            return None
        batch = x.numel() // call.in_features
        return call(x, batch)[0] if 0 < batch <= CPU_ROWS else None
