# SPDX-License-Identifier: Apache-2.0
"""`sparse_linear` on CUDA devices: the kernel, and how it is launched, by device, dtype, shape and number of rows.

Importing this module imports no Triton; the first call that wants one of its kernels does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor

from spon_plugin.kernels import gemm, reference
from spon_plugin.kernels.few_rows import GPU_ROWS
from spon_plugin.kernels.triton.configs import DTYPES, SCALED_MODULES, Launch, choose
from spon_plugin.weights.scaled import ScaledWeight

# Tensor cores that take bfloat16, and asynchronous copies, came with this one.
LEAST_CAPABILITY = (8, 0)
# Channels of a tensor core's product, all of one group.
LEAST_GROUP = 16


def sparse_linear(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    shard_sizes: Sequence[int] | None = None,
) -> Tensor:
    """``y = S(x) weight_t + bias`` by what is fastest for few or many rows.

    Nothing here waits for the device, and which kernel runs depends on shapes alone, so a call can be captured in a
    CUDA graph once the same shapes have run before (the first call compiles). `x` and the threshold may change between
    replays.

    Args:
        x: as in `reference.sparse_linear`.
        weight_t: likewise.
        threshold: likewise.
        bias: likewise.
        shard_sizes: likewise.

    Returns:
        ``[..., out_features]`` in `x.dtype`.

    Raises:
        SponError: arguments that do not fit each other.
    """
    in_features, out_features = weight_t.shape
    rows = x.shape[:-1].numel()
    if x.dtype not in DTYPES.values() or not in_features or not out_features or not rows:
        return reference.sparse_linear(x, weight_t, threshold, bias, shard_sizes=shard_sizes)
    name = device_name(x.device)
    launch = choose(name, x.dtype, in_features, out_features, rows) if rows <= GPU_ROWS else None
    kernel = None if launch is None else kernel_of(launch.kernel, x.device)
    if kernel is None:
        return gemm.sparse_linear(x, weight_t, threshold, bias, shard_sizes=shard_sizes)
    return kernel(x, weight_t, threshold, bias, shard_sizes=shard_sizes, launch=launch)


def sparse_linear_scaled(
    x: Tensor,
    weight: ScaledWeight,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
    exact: bool = True,
) -> Tensor:
    """``y = S(x) W^T + bias`` for few rows and a weight that `why_not` has nothing against.

    Args:
        x: as in `reference.sparse_linear`.
        weight: int8, int4 or FP8, with scales.
        threshold: as in `reference.sparse_linear`.
        bias: likewise.
        shard_sizes: likewise.
        exact: it always is: inputs are multiplied as they are.

    Returns:
        ``[..., out_features]`` in `x.dtype`.
    """
    launch = _scaled_launch(x, weight)
    assert launch is not None
    kernel = kernel_of(SCALED_MODULES[launch.kernel], x.device)
    assert kernel is not None
    return kernel(x, weight, threshold, bias, shard_sizes=shard_sizes, launch=launch)


def _scaled_launch(x: Tensor, weight: ScaledWeight) -> Launch | None:
    rows = x.shape[:-1].numel()
    return choose(device_name(x.device), weight.format, weight.in_features, weight.out_features, rows)


def why_not(x: Tensor, weight: ScaledWeight) -> str:
    """The reason why the kernel does not take a weight with scales as it lies, or so many rows; empty where it does."""
    if x.dtype not in DTYPES.values():
        return f"for float32, bfloat16 and float16, not {x.dtype}"
    if x.dtype == torch.float32 and x.shape[:-1].numel() > 1:
        return "for one row of float32: products of several run outside the tensor cores"
    if weight.codes.dtype != weight.code_dtype:
        return f"{weight.format} codes of {weight.codes.dtype}"
    if weight.group_of_row is not None:
        return "groups that are no runs of inputs (act-order)"
    if weight.scales.shape[0] > 1 and weight.group_size % LEAST_GROUP:
        return f"groups of {weight.group_size}, not a multiple of {LEAST_GROUP}"
    if not weight.in_features or not weight.out_features:
        return "nothing to multiply"
    for name in ("codes", "scales", "zeros", "offsets"):
        part = getattr(weight, name)
        if part is not None and part.device != x.device:
            return f"{name} on {part.device}"
        if part is not None and part.stride(1) != 1:
            return f"{name} that do not lie by inputs: call arranged() once"
    if _scaled_launch(x, weight) is None:
        return "more rows than pay for this shape (`configs/`)"
    return "" if kernel_of("scaled", x.device) is not None else "no Triton, or a GPU that is too old for it"


@lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """The name that `configs.choose` goes by; "cpu" and the like where Triton interprets the kernels."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@lru_cache(maxsize=64)
def kernel_of(name: str, device: torch.device) -> Callable[..., Tensor] | None:
    """The Triton kernel `name`, or None, with one warning, where it cannot run: without Triton, or on an old GPU."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        problem = f"{device_name(device)} is older than compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
    else:
        try:
            return import_module(f"spon_plugin.kernels.triton.{name}").sparse_linear
        except ImportError as error:
            problem = f"Triton cannot be imported ({error})"
    warnings.warn(
        f"sparse_linear: {problem}; masked inputs are multiplied densely, which skips no bytes.",
        RuntimeWarning,
        stacklevel=3,
    )
    return None
