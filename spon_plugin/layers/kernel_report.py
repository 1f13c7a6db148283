# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes each kind of linear of a model on this machine, and why the faster ones do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from spon_plugin.kernels.few_rows import CPU_ROWS, GPU_ROWS
from spon_plugin.kernels.table import DENSE, Problem, described, reasons
from spon_plugin.layers.sparse_linear import SparseLayer
from spon_plugin.weights import Opaque, RowWeight, linear_features, weight_of
from spon_plugin.weights.dense import DenseWeight
from spon_plugin.weights.scaled import ScaledWeight


class KernelRow(NamedTuple):
    """A kind of linear: those of one name, one class and one size.

    Attributes:
        linears: their last name, such as ``down_proj``.
        number: how many they are.
        format: of the weight, as in `RowWeight`; "opaque" for one whose rows cannot be read.
        in_features: length of an input.
        out_features: length of an output.
        dtype: of the inputs.
        kernel: what computes one token, as `kernels.table.described` has it; for an opaque weight, the linear's class.
        many: the same for more tokens than kernels for few rows take.
        why_not: the kernels that are faster, where they run, by name -> why they do not compute one token here.
    """

    linears: str
    number: int
    format: str
    in_features: int
    out_features: int
    dtype: str
    kernel: str
    many: str
    why_not: dict[str, str]


@torch.no_grad()
def kernel_rows(linears: Mapping[str, nn.Module], dtype: torch.dtype) -> list[KernelRow]:
    """The kinds among some linears, in their order.

    Args:
        linears: path -> a sparse layer, or a linear of a base as it will be once it is merged. They are not changed; of
            each kind, one weight is read.
        dtype: of the model, which quantized linears take their inputs in.
    """
    kinds: dict[tuple[Any, ...], list[nn.Module]] = {}
    for path, module in linears.items():
        weight: Any = getattr(module, "weight", None)
        held = type(weight).__name__, getattr(weight, "dtype", None), getattr(module, "ggml_type", None)
        kinds.setdefault((path.rpartition(".")[2], type(module), linear_features(module), *held), []).append(module)
    return [_row(key[0], len(modules), modules[0], dtype) for key, modules in kinds.items()]


def _row(name: str, number: int, module: nn.Module, dtype: torch.dtype) -> KernelRow:
    weight = weight_of(module, dtype)
    sizes = weight.in_features, weight.out_features
    if isinstance(weight, Opaque):
        own, why = f"{type(module).__name__} itself, on masked inputs", {"all": weight.reason}
        return KernelRow(name, number, "opaque", *sizes, _short(weight.dtype), own, own, why)
    if isinstance(weight, DenseWeight):
        dtype = weight.dtype
        if isinstance(module, SparseLayer) and not weight.codes.is_contiguous():
            own, why = "masked dense product", {"all": "the weight lies by outputs, as at threshold 0"}
            return KernelRow(name, number, DENSE, *sizes, _short(dtype), own, own, why)
    one, many = (_problem(weight, rows, dtype) for rows in (1, 1 + max(CPU_ROWS, GPU_ROWS)))
    return KernelRow(name, number, weight.format, *sizes, _short(dtype), described(one), described(many), reasons(one))


def _problem(weight: RowWeight, rows: int, dtype: torch.dtype) -> Problem:
    x = torch.empty((rows, weight.in_features), dtype=dtype, device=weight.codes.device)
    return Problem(x, weight.arranged() if isinstance(weight, ScaledWeight) else None)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
