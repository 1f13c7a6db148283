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
from spon_plugin.kernels.triton.configs import DTYPES, choose

# Tensor cores that take bfloat16, and asynchronous copies, came with this one.
LEAST_CAPABILITY = (8, 0)


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
