# SPDX-License-Identifier: Apache-2.0
"""`spon_vllm::linear`: the sparse linear layer as one operator that `torch.compile` cannot look into.

vLLM drops Dynamo's guards, so whatever Python decides while a graph is traced stays decided: a branch on the number of
tokens, a threshold that is a float, a bias that is None. Here the branch is inside the operator, and thresholds and
biases are tensors. What the operator may know about a step is in `steps`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spon_plugin.kernels import sparse_linear
from spon_plugin.kernels.gemm import dense_linear
from spon_plugin.kernels.table import DECODED, Problem, choose
from spon_plugin.masking import deviation, sparsify
from spon_plugin.weights.formats import SCALED
from spon_vllm import hosts, metrics, steps
from spon_vllm.settings import EVERY_STEP, MEASURED, NO_STEP

# A threshold of dense steps: the same tensor every time, by which the CPU kernel knows a call again.
_NOTHING = torch.zeros(1, device="cpu")

_LIBRARY = torch.library.Library("spon_vllm", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor threshold, Tensor sparse_bias, Tensor? dense_bias, int[]? shard_sizes, "
    "int limit, Tensor? center=None) -> Tensor"
)
_LIBRARY.define(
    "linear_rows(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? group_of_row, int group_size, "
    "str format, Tensor? host, Tensor threshold, Tensor sparse_bias, Tensor? dense_bias, int[]? shard_sizes, "
    "int limit, Tensor? center=None, bool exact=False) -> Tensor"
)
_LIBRARY.define("mask(Tensor x, Tensor threshold, int limit, Tensor? center=None) -> Tensor")
_LIBRARY.define("add_bias(Tensor y, Tensor extra, int limit) -> Tensor")


def linear(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    sparse_bias: Tensor,
    dense_bias: Tensor | None,
    shard_sizes: list[int] | None,
    limit: int,
    center: Tensor | None = None,
) -> Tensor:
    """``S(x) weight^T + sparse_bias`` in a sparse step, ``x weight^T + dense_bias`` in a dense one; see `runs_sparse`.

    With a centre it is ``(S(x) - center) weight^T + sparse_bias``.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``, whose transpose is contiguous.
        threshold: float32 ``[1]``, or per channel ``[1, in_features]``; with `shard_sizes` ``[n_shards]`` or
            ``[n_shards, in_features]``.
        sparse_bias: float32 ``[out_features]``, ``b + W (center + alpha)``.
        dense_bias: ``[out_features]``, the base model's; None for none.
        shard_sizes: the widths of the linears fused in `weight`, where their thresholds differ.
        limit: as in `runs_sparse`.
        center: float32 ``[in_features]``, or None for 0.

    Returns:
        ``[..., out_features]`` in `x.dtype`.
    """
    weight_t = weight.as_subclass(Tensor).t()  # not vLLM's parameter class, which would cost the kernel its short way
    if not runs_sparse(x, limit):
        metrics.COUNTERS.count_dense(x, threshold)
        if x.shape[:-1].numel() <= hosts.few_rows(x.device):
            return sparse_linear(x, weight_t, _NOTHING, dense_bias)
        return dense_linear(x, weight_t, dense_bias)
    x = _masked_input(x, threshold, center)
    return sparse_linear(x, weight_t, threshold, sparse_bias, shard_sizes=shard_sizes or [weight.shape[0]])


def linear_rows(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_of_row: Tensor | None,
    group_size: int,
    format: str,
    host: Tensor | None,
    threshold: Tensor,
    sparse_bias: Tensor,
    dense_bias: Tensor | None,
    shard_sizes: list[int] | None,
    limit: int,
    center: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """`linear` for a weight with scales.

    What is large runs by the base's own method where there is one: dense steps (`hosts.takes`), and sparse ones of so
    many rows that no kernel skips any, as long as they have one mask.

    Args:
        x: ``[..., in_features]``.
        codes: as in `ScaledWeight`, like those up to `format`.
        scales: likewise.
        zeros: likewise.
        group_of_row: likewise.
        group_size: likewise.
        format: likewise.
        host: the layer's number in `hosts`; None where the base's own method holds no weight.
        threshold: as in `linear`, like those that follow.
        sparse_bias: likewise.
        dense_bias: likewise.
        shard_sizes: likewise.
        limit: likewise.
        center: likewise.
        exact: see `sparse_linear`.

    Returns:
        ``[..., out_features]`` in `x.dtype`.
    """
    weight = SCALED[format](codes, scales, zeros, group_size, group_of_row)
    if not runs_sparse(x, limit):
        metrics.COUNTERS.count_dense(x, threshold)
        if host is not None and hosts.takes(host, x.shape[:-1].numel()):
            return hosts.dense(host, x, dense_bias)
        return sparse_linear(x, weight, nothing(x), dense_bias, exact=exact)
    x = _masked_input(x, threshold, center)
    tokens = x.shape[:-1].numel()
    if host is not None and tokens > 1 and not shard_sizes and choose(Problem(x, weight)).name == DECODED:
        return (hosts.dense(host, sparsify(x, threshold), None).float() + sparse_bias).to(x.dtype)
    sizes = shard_sizes or [weight.out_features]
    return sparse_linear(x, weight, threshold, sparse_bias, shard_sizes=sizes, exact=exact)


def nothing(x: Tensor) -> Tensor:
    """A threshold for `x` that masks nothing, as dense steps run on our kernels."""
    return _NOTHING if x.is_cpu else x.new_zeros(1, dtype=torch.float32)


def _masked_input(x: Tensor, threshold: Tensor, center: Tensor | None) -> Tensor:
    """What a sparse step masks, counted."""
    x = _zero_padding(deviation(x, center))
    metrics.COUNTERS.count_sparse(x, threshold)
    return x


def mask(x: Tensor, threshold: Tensor, limit: int, center: Tensor | None = None) -> Tensor:
    """``S(x) - center`` in a sparse step, a copy of `x` in a dense one; for other weight formats."""
    if not runs_sparse(x, limit):
        metrics.COUNTERS.count_dense(x, threshold)
        return x.clone()
    x = deviation(x, center)
    metrics.COUNTERS.count_sparse(x, threshold)
    return sparsify(x, threshold)


def add_bias(y: Tensor, extra: Tensor, limit: int) -> Tensor:
    """``y + extra`` in a sparse step, a copy of `y` in a dense one; added in float32."""
    return (y.float() + extra).to(y.dtype) if runs_sparse(y, limit) else y.clone()


def runs_sparse(x: Tensor, limit: int) -> bool:
    """Whether a step with the tokens of `x` ``[..., features]`` is sparse.

    Args:
        x: of some linear layer.
        limit: `EVERY_STEP`, `NO_STEP`, `MEASURED`, or a number: a step is sparse that has at most so many tokens,
            padding included, and one in each request, as far as that is known (`steps.decodes_only`).
    """
    tokens = x.shape[:-1].numel()
    limit = steps.measured() if limit == MEASURED else limit
    if limit in (EVERY_STEP, NO_STEP):
        return limit == EVERY_STEP
    return tokens == 1 or (tokens <= limit and steps.decodes_only(tokens))


def _zero_padding(x: Tensor) -> Tensor:
    """`x` with the rows of padding zeroed, which no threshold keeps.

    What they hold is left over, NaN at times: kept, it would make a kernel read weights that no token needs.
    """
    tokens = x.shape[:-1].numel()
    rows = None if tokens == 1 else steps.padding(tokens)
    return x if rows is None else x.masked_fill(rows.view(*x.shape[:-1], 1), 0)


def _like_linear(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    sparse_bias: Tensor,
    dense_bias: Tensor | None,
    shard_sizes: list[int] | None,
    limit: int,
    center: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _like_linear_rows(x: Tensor, codes: Tensor, scales: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


for _name, _implementation, _fake in (
    ("linear", linear, _like_linear),
    ("linear_rows", linear_rows, _like_linear_rows),
    ("mask", mask, lambda x, threshold, limit, center=None: torch.empty_like(x)),
    ("add_bias", add_bias, lambda y, extra, limit: torch.empty_like(y)),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spon_vllm::{_name}", _fake, lib=_LIBRARY)
