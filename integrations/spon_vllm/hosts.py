# SPDX-License-Identifier: Apache-2.0
"""The base's own method beside ours: whether it can compute here, and how the operator finds it.

vLLM chooses a kernel while a method makes its parameters, and refuses the model where it has none: its CPU build has
none for 8-bit integers, none for 4-bit ones without AVX-512, and none for FP8 weights beside float inputs. Weights that
our kernels read need the parameters alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from spon_plugin.kernels.few_rows import CPU_ROWS

_CHOOSES_A_KERNEL = re.compile(r"(choose|init)_\w*linear_kernel")
_layers: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = count()


class SponRowKernels:
    """In the place of a kernel, and of its class, where only ours read the weight; vLLM logs this name."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.config = self

    def input_quant_key(self) -> None:
        """No layer before this one may quantize its input."""


@contextmanager
def without_kernels(method: Any, layer: Any) -> Iterator[None]:
    """While it lasts, `method` makes the parameters of `layer` without a kernel for them.

    Args:
        method: the base's own.
        layer: vLLM's; its `scheme`, if it has one, is what makes them.
    """
    changed: list[tuple[Any, str, Any]] = []
    try:
        for module in {type(owner).__module__ for owner in (method, getattr(layer, "scheme", None))}:
            for name, value in list(vars(sys.modules[module]).items()):
                if _CHOOSES_A_KERNEL.fullmatch(name):
                    changed.append((sys.modules[module], name, value))
                    stand_in = SponRowKernels if name.startswith("choose") else SponRowKernels()
                    setattr(sys.modules[module], name, lambda *_args, _stand_in=stand_in, **_kwargs: _stand_in)
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


@torch.no_grad()
def why_not(method: Any, layer: Any, in_features: int) -> str:
    """The reason why `method` cannot compute `layer` on this machine, found by trying; empty where it can.

    Args:
        method: the base's own, which has prepared the layer.
        layer: vLLM's.
        in_features: of this rank.
    """
    device = next(layer.parameters()).device
    try:
        method.apply(layer, torch.zeros(2, in_features, dtype=layer.params_dtype, device=device), None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a kernel says that was built for another machine
        return said(error)
    return ""


def dtype_objection(config: Any, method: Any, dtype: torch.dtype) -> str:
    """Why the base's own method does not compute in `dtype`; empty where it does.

    Args:
        config: the base's own quantization; None for none.
        method: the layer's own, which may be that of a layer that the base leaves unquantized.
        dtype: of activations.
    """
    if config is None or isinstance(method, UnquantizedLinearMethod):
        return ""
    own = config.get_supported_act_dtypes()
    return "" if dtype in own else f"for {' and '.join(str(one) for one in own)}, not {dtype}"


def said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def number(layer: Any) -> Tensor:
    """What `dense` knows a layer by: int64 ``[1]`` on the CPU, so that blocks are one graph to a compiler."""
    key = next(_numbers)
    _layers[key] = layer
    return torch.tensor([key], device="cpu")


def few_rows(device: torch.device) -> int:
    """The most rows of a dense step that our kernels compute, where nothing has been measured.

    A CPU without AVX-512 has no instruction for products of bytes: methods for them take a prompt's time for two rows.
    Nor are its GEMMs made for few rows of a weight that lies by inputs, of which they read every column anew.
    """
    return CPU_ROWS if device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability() else 0


def takes(host: Tensor, tokens: int) -> bool:
    """Whether the base's own method computes dense steps of so many tokens, and not our kernels."""
    return bool(tokens > _layers[int(host)].spon_own_rows)


def dense(host: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """The dense layer by the base's own method.

    Args:
        host: a layer's `number`.
        x: ``[..., in_features]``.
        bias: ``[out_features]``; None for none.
    """
    layer = _layers[int(host)]
    y: Tensor = layer.quant_method.inner.apply(layer, x, bias)
    return y
