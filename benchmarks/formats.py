# SPDX-License-Identifier: Apache-2.0
"""Weights for `benchmarks.sparse_linear` in each format, and the dense products that they have to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import cuda_baselines
from spon_plugin import RowWeight, machine
from spon_plugin.kernels.few_rows import CPU_ROWS
from spon_plugin.weights.dense import DenseWeight
from spon_plugin.weights.formats import SCALED
from spon_plugin.weights.fp8 import Fp8Weight
from spon_plugin.weights.int4 import Int4Weight, pack_nibbles, unpack_nibbles
from spon_plugin.weights.int8 import Int8Weight
from spon_plugin.weights.scaled import ScaledWeight

FORMATS = (DenseWeight.format, *SCALED)


def make(format: str, shape: tuple[int, int], dtype: torch.dtype, group: int, generator: torch.Generator) -> RowWeight:
    """A random weight ``[in_features, out_features]``; scales are bfloat16, as checkpoints have them.

    Args:
        format: of `FORMATS`.
        shape: in_features and out_features.
        dtype: of a dense weight.
        group: inputs that share a scale; 0 for all of them.
        generator: of its device.
    """
    device = generator.device
    if format == "dense":
        return DenseWeight(torch.randn(shape, generator=generator, device=device).to(dtype))
    size = group or shape[0]
    groups = -(-shape[0] // size)
    scales = torch.rand((groups, shape[1]), generator=generator, device=device).add_(0.5).mul_(0.01).bfloat16()
    if format == "fp8":
        codes = torch.randn(shape, generator=generator, device=device).to(torch.float8_e4m3fn)
        return Fp8Weight(codes, scales, None, size)
    if format == "int8":
        codes = torch.randint(-127, 128, shape, generator=generator, device=device, dtype=torch.int8)
        return Int8Weight(codes, scales, None, size)
    codes = torch.randint(0, 16, shape, generator=generator, device=device, dtype=torch.uint8)
    return Int4Weight(pack_nibbles(codes), scales, None, size)


def clone(weight: RowWeight) -> RowWeight:
    """The same values elsewhere in memory, as a layer holds them."""
    if isinstance(weight, ScaledWeight):
        return replace(weight, codes=weight.codes.clone(), scales=weight.scales.clone()).arranged()
    return replace(weight, codes=weight.codes.clone())


def alias(weight: RowWeight) -> RowWeight:
    """The same values at the same place, as a weight of its own: kernels remember what a weight was called with."""
    return replace(weight, codes=weight.codes.view_as(weight.codes))


def tensors(weight: RowWeight) -> list[Tensor]:
    """What a product with nothing masked reads."""
    return [weight.codes, weight.scales] if isinstance(weight, ScaledWeight) else [weight.codes]


def words(weight: RowWeight) -> list[Tensor]:
    """The memory that `weight` lies in, flat, int64, what lies between its rows with it; the weight is on a CPU."""
    flat = [part.as_strided((part.shape[0] * part.stride(0),), (1,)) for part in tensors(weight)]
    return [part.view(torch.int64) for part in flat]


def nbytes(weight: RowWeight) -> int:
    """Bytes of `tensors`."""
    return sum(part.numel() * part.element_size() for part in tensors(weight))


def baselines(
    weights: Sequence[RowWeight], x: Tensor, bias: Tensor, group: int, library: Path | None = None
) -> dict[str, Callable[[int], Tensor]]:
    """Dense products on as many cold weights: torch's linear layer, and the field's own kernels for the format.

    Args:
        weights: copies of one.
        x: ``[rows, in_features]``.
        bias: ``[out_features]``.
        group: of int4.
        library: Marlin's (`benchmarks.marlin`), on a GPU.

    Returns:
        "torch", in the dtype of x; "torch float32" where the machine emulates that dtype; "oneDNN" on a CPU, for more
        rows than our kernels for few take: its product of a weight that it has packed, as vLLM runs it, in the dtype
        of x where the machine multiplies that and else in float32;
        "packed", torch's weight-only kernel for int8 by output and for int4 by group, in bfloat16 alone; and what
        `cuda_baselines` has besides.
    """
    in_features, out_features = weights[0].in_features, weights[0].out_features
    matrices = _copies(torch.randn(out_features, in_features, device=x.device).to(x.dtype), weights)
    calls: dict[str, Callable[[int], Tensor]] = {"torch": lambda i: F.linear(x, matrices[i % len(matrices)], bias)}
    if not machine.is_native(x.dtype, x.device):
        wide, wide_x, wide_bias = _copies(matrices[0].float(), weights), x.float(), bias.float()
        calls["torch float32"] = lambda i: F.linear(wide_x, wide[i % len(wide)], wide_bias)
    if not x.is_cuda and x.shape[0] > CPU_ROWS:
        dtype = machine.compute_dtype(x.dtype)
        blocked = [torch.ops.mkldnn._reorder_linear_weight(m.to(dtype), x.shape[0]) for m in matrices[:3]]
        calls["oneDNN"] = lambda i: torch.ops.mkldnn._linear_pointwise(
            x.to(dtype), blocked[i % len(blocked)], bias.to(dtype), "none", [], ""
        )
    first = weights[0]
    if x.dtype != torch.bfloat16 or not isinstance(first, ScaledWeight):
        return calls
    if x.device.type == "cuda":
        copies = [weight for weight in weights if isinstance(weight, ScaledWeight)]
        return {**calls, **cuda_baselines.baselines(copies, x, library)}
    if first.format == "int8" and first.scales.shape[0] == 1:
        by_output = _copies(first.codes.t().contiguous(), weights)
        calls["packed"] = lambda i: torch._weight_int8pack_mm(x, by_output[i % len(by_output)], first.scales[0]) + bias
    elif first.format == "int4" and group in (32, 64, 128, 256) and not in_features % group and out_features % 16 == 0:
        codes = unpack_nibbles(first.codes, out_features).t().contiguous().int()
        packed = _copies(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), weights)
        pairs = torch.stack([first.scales, torch.zeros_like(first.scales)], -1)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        calls["packed"] = lambda i: product(x, packed[i % len(packed)], group, pairs) + bias
    return calls


def _copies(matrix: Tensor, weights: Sequence[RowWeight]) -> list[Tensor]:
    """Enough copies of `matrix` for as many bytes as `weights` have, at least three."""
    count = -(-len(weights) * nbytes(weights[0]) // (matrix.numel() * matrix.element_size()))
    return [matrix.clone() for _ in range(max(3, count))]
