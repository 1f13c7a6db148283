# SPDX-License-Identifier: Apache-2.0
"""`spon::sparse_linear`: one operator for every device, opaque to `torch.compile` and safe in CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.kernels import gemm
from spon_plugin.kernels.arguments import Thresholds, check_arguments, check_threshold
from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.kernels.few_rows import CPU_ROWS
from spon_plugin.kernels.triton import launch as cuda
from spon_plugin.machine import DTYPES
from spon_plugin.masking import keep_mask, sparsify

_LIBRARY = torch.library.Library("spon", "DEF")
_LIBRARY.define(
    "sparse_linear(Tensor x, Tensor weight_t, Tensor threshold, Tensor? bias=None, int[]? shard_sizes=None) -> Tensor"
)


def sparse_linear(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
) -> Tensor:
    """``y = S(x) weight_t + bias``, reading only the rows of `weight_t` that the mask keeps where that is faster.

    Arguments, shapes and dtypes are those of `reference.sparse_linear`. Which implementation runs depends on device,
    dtype and number of rows; see `implementation`. All of them mask alike (`masking.keep_mask`) and accumulate in
    float32; a GEMM of torch adds up in its own order. The gradient is that of the reference: through the kept entries.

    Raises:
        SponError: arguments that do not fit each other.
    """
    if is_plain(x, weight_t, bias):
        # The dispatcher and its Python bridge cost several microseconds, as much as a small layer's work.
        return _run(x, weight_t, threshold, bias, shard_sizes)
    return torch.ops.spon.sparse_linear(x, weight_t, threshold, bias, shard_sizes)


def implementation(x: Tensor) -> str:
    """The name of what `sparse_linear` runs for an input like `x`: "cuda", "cpu" (sparse) or "gemm" (masked dense)."""
    if x.is_cuda:
        return "cuda"
    # Between one row's elements and those of the most rows; without a division, which an empty row would not survive.
    few = 0 < x.numel() <= CPU_ROWS * x.size(-1)
    return "cpu" if few and x.is_cpu and x.dtype in DTYPES.values() and cpu.is_available() else "gemm"


def is_plain(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> bool:
    """Whether nobody has to see this call: no compiler, tracer or transform, no tensor subclass, no gradient."""
    if type(x) is not Tensor or type(weight_t) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling():
        return False
    # Dispatch modes (make_fx, fake tensors), jit.trace and torch.func would miss what the kernel writes.
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    return not torch.is_grad_enabled() or not (
        x.requires_grad or weight_t.requires_grad or (bias is not None and bias.requires_grad)
    )


# The dispatcher leaves out trailing arguments that equal their defaults.
def _run(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    shard_sizes: Sequence[int] | None = None,
) -> Tensor:
    check_arguments(x, weight_t, bias)
    kind = implementation(x)
    if kind == "cuda":
        return cuda.sparse_linear(x, weight_t, threshold, bias, shard_sizes)
    if kind == "cpu":
        return cpu.sparse_linear(x, weight_t, threshold, bias, shard_sizes=shard_sizes)
    return gemm.sparse_linear(x, weight_t, threshold, bias, shard_sizes=shard_sizes)


def _fake(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    shard_sizes: Sequence[int] | None = None,
) -> Tensor:
    check_arguments(x, weight_t, bias)
    in_features, out_features = weight_t.shape
    check_threshold(threshold, in_features, out_features, [out_features] if shard_sizes is None else shard_sizes)
    return x.new_empty((*x.shape[:-1], out_features))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_t, threshold, bias, ctx.shard_sizes = (*inputs, None, None)[:5]
    ctx.save_for_backward(x, weight_t, threshold)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight_t, threshold = ctx.saved_tensors
    thresholds = Thresholds.of(threshold, weight_t, ctx.shard_sizes)
    shards = list(zip(thresholds.rows, grad.split(thresholds.sizes, -1), strict=True))
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        columns = weight_t.split(thresholds.sizes, 1)
        # Chosen, not multiplied: an infinite gradient must not turn masked entries into NaN.
        parts = [
            torch.where(keep_mask(x, tau), part @ column.t(), 0)
            for (tau, part), column in zip(shards, columns, strict=True)
        ]
        grad_x = torch.stack(parts).sum(0)
    if ctx.needs_input_grad[1]:
        rows = x.reshape(-1, x.shape[-1])
        kept = [sparsify(rows, tau).t() @ part.reshape(-1, part.shape[-1]) for tau, part in shards]
        grad_weight = torch.cat(kept, 1)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, grad_weight, None, grad_bias, None


_LIBRARY.impl("sparse_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("spon::sparse_linear", _fake, lib=_LIBRARY)
torch.library.register_autograd("spon::sparse_linear", _backward, setup_context=_save, lib=_LIBRARY)
