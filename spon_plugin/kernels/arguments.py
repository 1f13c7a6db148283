# SPDX-License-Identifier: Apache-2.0
"""What the arguments of `sparse_linear` mean, and the checks that they make sense."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spon_plugin.errors import SponError


class Thresholds(NamedTuple):
    """Thresholds per shard.

    Attributes:
        rows: for each group of outputs its threshold, float32 ``[1]`` or ``[in_features]``.
        sizes: the width of each group; they add up to out_features. One group where all outputs share a mask.
    """

    rows: tuple[Tensor, ...]
    sizes: list[int]

    @staticmethod
    def of(
        threshold: Tensor, weight_t: Tensor, shard_sizes: Sequence[int] | None, out_features: int | None = None
    ) -> Thresholds:
        """Read `threshold` in the light of `shard_sizes`.

        Args:
            threshold: as in `reference.sparse_linear`.
            weight_t: the weight, a row for each input.
            shard_sizes: as in `reference.sparse_linear`.
            out_features: length of an output; None for the length of a row.

        Raises:
            SponError: the two do not fit each other or `weight_t`.
        """
        in_features = weight_t.shape[0]
        out_features = weight_t.shape[1] if out_features is None else out_features
        if threshold.device != weight_t.device:
            raise SponError.of("threshold", threshold.device, f"the device of weight_t ({weight_t.device})")
        if shard_sizes is None and threshold.dtype is torch.float32 and threshold.shape == (1,):
            # The usual case, short of all checks: a decoding step passes here hundreds of times.
            return Thresholds((threshold,), [out_features])
        sizes = [out_features] if shard_sizes is None else list(shard_sizes)
        check_threshold(threshold, in_features, out_features, sizes)
        if len(sizes) > 1 and (threshold.dim() == 2 or threshold.numel() == len(sizes)):
            rows = threshold if threshold.dim() == 2 else threshold.unsqueeze(1)
            return Thresholds(rows.unbind(0), sizes)
        return Thresholds((threshold.reshape(-1),), [out_features])


def check_threshold(threshold: Tensor, in_features: int, out_features: int, sizes: Sequence[int]) -> None:
    """Refuse a threshold of another dtype or shape than `sparse_linear` takes.

    Raises:
        SponError: naming what was received.
    """
    if threshold.dtype != torch.float32:
        raise SponError.of("threshold", threshold.dtype, "float32", "Compare in float32: threshold.float().")
    if sum(sizes) != out_features or not all(size > 0 for size in sizes):
        raise SponError.of("shard_sizes", list(sizes), f"positive widths that add up to out_features ({out_features})")
    shards = len(sizes)
    # A tuple, not a set: under torch.compile sizes may be symbols, which have no hash.
    shapes = ((1,), (in_features,), (shards,), (shards, in_features))
    if tuple(threshold.shape) not in shapes:
        raise SponError.of(
            "threshold",
            f"shape {tuple(threshold.shape)}",
            f"shape (1,), ({in_features},) per channel, or per shard ({shards},) or ({shards}, {in_features})",
        )


def check_arguments(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> None:
    """Refuse tensors that do not belong together.

    Raises:
        SponError: naming the argument, what was received and what was expected.
    """
    shape, device = weight_t.shape, weight_t.device
    # A kernel reads addresses: one of another device would end the process.
    if x.device != device:
        raise SponError.of("x", x.device, f"the device of weight_t ({device})")
    if bias is not None and bias.device != device:
        raise SponError.of("bias", bias.device, f"the device of weight_t ({device})")
    fits = len(shape) == 2 and weight_t.is_contiguous() and x.dim() > 0 and x.size(-1) == shape[0]
    if fits and x.dtype == weight_t.dtype and (bias is None or (bias.dtype == x.dtype and bias.shape == shape[1:])):
        return  # the usual case: a decoding step passes here hundreds of times
    if weight_t.dim() != 2 or not weight_t.is_contiguous():
        raise SponError.of(
            "weight_t",
            f"shape {tuple(weight_t.shape)}, strides {weight_t.stride()}",
            "a contiguous matrix [in_features, out_features]",
            "Pass weight.t().contiguous() of a linear layer's weight, made once, not at every call.",
        )
    if x.dim() == 0 or x.shape[-1] != weight_t.shape[0]:
        raise SponError.of("x", f"shape {tuple(x.shape)}", f"[..., {weight_t.shape[0]}], weight_t's in_features")
    if x.dtype != weight_t.dtype:
        raise SponError.of("x", x.dtype, f"the dtype of weight_t ({weight_t.dtype})")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight_t.shape[1]):
        raise SponError.of(
            "bias", f"shape {tuple(bias.shape)}", f"shape ({weight_t.shape[1]},), weight_t's out_features"
        )
    if bias is not None and bias.dtype not in (torch.float32, x.dtype):
        raise SponError.of("bias", bias.dtype, f"float32 or the dtype of x ({x.dtype})")


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


def begins_within_a_byte(sizes: Sequence[int], unit: int) -> bool:
    """Whether a shard after the first begins within a byte of codes.

    Args:
        sizes: outputs of each shard.
        unit: outputs of a byte.
    """
    return any(end % unit for end in accumulate(sizes[:-1]))
