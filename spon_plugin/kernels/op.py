# SPDX-License-Identifier: Apache-2.0
"""`spon::sparse_linear`: one operator for every device, opaque to `torch.compile` and safe in CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spon_plugin.kernels import row_op
from spon_plugin.kernels.arguments import Thresholds, check_arguments, check_threshold, is_plain
from spon_plugin.kernels.cpu.known_calls import recall_matrix
from spon_plugin.kernels.table import Problem, choose
from spon_plugin.masking import keep_mask, sparsify
from spon_plugin.weights.row_weight import RowWeight
from spon_plugin.weights.scaled import ScaledWeight

_LIBRARY = torch.library.Library("spon", "DEF")
_LIBRARY.define(
    "sparse_linear(Tensor x, Tensor weight_t, Tensor threshold, Tensor? bias=None, int[]? shard_sizes=None) -> Tensor"
)


def sparse_linear(
    x: Tensor,
    weight_t: Tensor | RowWeight,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
    exact: bool = False,
) -> Tensor:
    """``y = S(x) weight_t + bias``, reading only the rows of `weight_t` that the mask keeps where that is faster.

    Arguments, shapes and dtypes are those of `reference.sparse_linear`. Which kernel runs depends on device, dtype,
    format and number of rows: `table.choose` says which, `table.reasons` why not a faster one. All of them mask alike
    (`masking.keep_mask`) and accumulate in float32; a GEMM of torch adds up in its own order. The gradient is that of
    the reference: through the kept entries, for x, the bias and a matrix.

    Args:
        x: ``[..., in_features]``.
        weight_t: ``[in_features, out_features]`` in `x.dtype`, or a `RowWeight` of any format. One with scales does not
            depend on the dtype of x; a dense one of another dtype or layout is copied at every call.
        threshold: as in `reference.sparse_linear`.
        bias: likewise.
        shard_sizes: likewise.
        exact: for four-bit weights, keep inputs as they are. By default few rows are rounded to eight bits and summed
            in integers, which is about three times as fast, and off by about 0.5% of an output's usual size.

    Raises:
        SponError: arguments that do not fit each other.
    """
    if isinstance(weight_t, RowWeight):
        if isinstance(weight_t, ScaledWeight):
            run = row_op.run if is_plain(x, weight_t.codes, bias) else row_op.call
            return run(x, weight_t, threshold, bias, shard_sizes, exact)
        weight_t = weight_t.codes.to(x.dtype).contiguous()  # itself, unless a host holds it otherwise
    if is_plain(x, weight_t, bias):
        # The dispatcher and its Python bridge cost several microseconds, as much as a small layer's work.
        return _run(x, weight_t, threshold, bias, shard_sizes)
    return torch.ops.spon.sparse_linear(x, weight_t, threshold, bias, shard_sizes)


def implementation(x: Tensor) -> str:
    """The name of what `sparse_linear` runs on a matrix for an input like `x`, as in `table.KERNELS`."""
    return choose(Problem(x)).name


# The dispatcher leaves out trailing arguments that equal their defaults.
def _run(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    shard_sizes: Sequence[int] | None = None,
) -> Tensor:
    known = recall_matrix(x, weight_t, threshold, bias, shard_sizes)
    if known is not None:
        return known(x)
    check_arguments(x, weight_t, bias)
    return choose(Problem(x)).run(x, weight_t, threshold, bias, shard_sizes=shard_sizes)


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
