# SPDX-License-Identifier: Apache-2.0
"""`sparse_linear` for the layers of a model that decodes on a CPU, with a layer's arguments checked once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.kernels.cpu import scaled
from spon_plugin.kernels.few_rows import CPU_ROWS
from spon_plugin.kernels.op import is_plain
from spon_plugin.machine import DTYPES
from spon_plugin.weights.scaled import ScaledWeight

_DTYPES = frozenset(DTYPES.values())


class _Settled:
    """What does not depend on x, settled at the first call, and again whenever the layer's tensors lie elsewhere.

    A decoding step passes hundreds of layers, and the small ones are done in less time than their arguments take to
    check. Copies and pickles of a layer settle for themselves.
    """

    __slots__ = ("_call", "_settled", "_tensors")

    def __init__(self) -> None:
        self._tensors: tuple[Any, ...] = ()
        self._settled: tuple[Any, ...] = ()
        self._call: Any = None

    def __reduce__(self) -> tuple[type[_Settled], tuple[()]]:
        return type(self), ()


class LayerCall(_Settled):
    """Calls the CPU kernel for one layer with a matrix for a weight."""

    __slots__ = ()

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The output of `layer` for `x` ``[..., in_features]``; None where `sparse_linear` itself has to be called.

        Args:
            layer: has a `weight_t` ``[in_features, out_features]``, a `bias` or None, and a `spon_threshold`.
            x: its input.
        """
        # Past the lookups of `nn.Module`, each of which takes half a microsecond.
        parameters = layer._parameters
        weight, bias, threshold = parameters["weight"], parameters["bias"], layer._buffers["spon_threshold"]
        assert weight is not None and threshold is not None
        if not is_plain(x, weight, bias) or torch.is_autocast_enabled("cpu"):
            return None
        settled = weight.data_ptr(), 0 if bias is None else bias.data_ptr(), threshold.data_ptr()
        if settled != self._settled:
            # Held, so that while the kernel knows an address nothing else can lie there.
            self._tensors = (weight, bias, threshold)
            self._call = cpu.prepare(layer.weight_t, threshold, bias)  # type: ignore[arg-type]
            self._settled = settled  # last: another Python thread may be reading
        call = self._call
        if call is None or x.dtype is not call.dtype or not x.is_cpu or x.shape[-1:] != (call.in_features,):
            return None
        batch = x.numel() // call.in_features
        return call(x, batch) if 0 < batch <= CPU_ROWS else None


class RowsCall(_Settled):
    """Calls the CPU kernel for one layer with a weight with scales."""

    __slots__ = ()

    def __call__(self, layer: nn.Module, weight: ScaledWeight, x: Tensor, exact: bool) -> Tensor | None:
        """The output of `layer` for `x` ``[..., in_features]``; None where `sparse_linear` itself has to be called.

        Args:
            layer: has a `bias` or None, and a `spon_threshold`.
            weight: the layer's.
            x: its input.
            exact: see `sparse_linear`.
        """
        bias, threshold = layer._parameters["bias"], layer._buffers["spon_threshold"]
        assert threshold is not None
        if not is_plain(x, weight.codes, bias):
            return None
        settled = weight, 0 if bias is None else bias.data_ptr(), threshold.data_ptr(), exact
        if settled != self._settled:
            self._tensors = (weight, bias, threshold)
            self._call = scaled.prepare(weight, threshold, bias, exact)
            self._settled = settled
        call = self._call
        if call is None or not x.is_cpu or x.shape[-1:] != (call.in_features,) or x.dtype not in _DTYPES:
            return None
        batch = x.numel() // call.in_features
        return call(x, batch) if 0 < batch <= CPU_ROWS else None
