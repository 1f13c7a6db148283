# SPDX-License-Identifier: Apache-2.0
"""`spon::sparse_linear`: one operator for every device, opaque to `torch.compile` and safe in CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spon_plugin.kernels import reference
from spon_plugin.kernels.arguments import check_arguments, check_threshold

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

    Arguments, shapes and dtypes are those of `reference.sparse_linear`.

    Raises:
        SponError: arguments that do not fit each other.
    """
    return torch.ops.spon.sparse_linear(x, weight_t, threshold, bias, shard_sizes)


def _run(x: Tensor, weight_t: Tensor, threshold: Tensor, bias: Tensor | None, shard_sizes: list[int] | None) -> Tensor:
    check_arguments(x, weight_t, bias)
    return reference.sparse_linear(x, weight_t, threshold, bias, shard_sizes=shard_sizes)


def _fake(x: Tensor, weight_t: Tensor, threshold: Tensor, bias: Tensor | None, shard_sizes: list[int] | None) -> Tensor:
    check_arguments(x, weight_t, bias)
    in_features, out_features = weight_t.shape
    check_threshold(threshold, in_features, out_features, shard_sizes or [out_features])
    return x.new_empty((*x.shape[:-1], weight_t.shape[1]))


_LIBRARY.impl("sparse_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("spon::sparse_linear", _fake, lib=_LIBRARY)
