# SPDX-License-Identifier: Apache-2.0
"""`spon::sparse_linear_rows`: the operator for weights with scales, as opaque to compilers as `spon::sparse_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spon_plugin.errors import SponError
from spon_plugin.kernels.arguments import Thresholds, check_threshold
from spon_plugin.kernels.cpu.known_calls import recall
from spon_plugin.kernels.table import Problem, choose
from spon_plugin.masking import keep_mask
from spon_plugin.weights.formats import SCALED
from spon_plugin.weights.scaled import ScaledWeight

LIBRARY = torch.library.Library("spon", "FRAGMENT")
LIBRARY.define(
    "sparse_linear_rows(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int group_size, Tensor? group_of_row, "
    "Tensor? offsets, str format, Tensor threshold, Tensor? bias=None, int[]? shard_sizes=None, bool exact=False) "
    "-> Tensor"
)


def call(
    x: Tensor,
    weight: ScaledWeight,
    threshold: Tensor,
    bias: Tensor | None,
    shard_sizes: Sequence[int] | None,
    exact: bool,
) -> Tensor:
    """The operator, on a weight's tensors; arguments as of `op.sparse_linear`."""
    w = weight
    parts = (w.codes, w.scales, w.zeros, w.group_size, w.group_of_row, w.offsets, w.format)
    return torch.ops.spon.sparse_linear_rows(x, *parts, threshold, bias, shard_sizes, exact)


def run(
    x: Tensor,
    weight: ScaledWeight,
    threshold: Tensor,
    bias: Tensor | None,
    shard_sizes: Sequence[int] | None,
    exact: bool,
) -> Tensor:
    """The kernel that the table chooses, past the dispatcher.

    Raises:
        SponError: arguments that do not fit each other.
    """
    known = recall(x, weight, threshold, bias, shard_sizes, exact)
    return _choose_and_run(x, weight, threshold, bias, shard_sizes, exact) if known is None else known(x)


def _choose_and_run(
    x: Tensor,
    weight: ScaledWeight,
    threshold: Tensor,
    bias: Tensor | None,
    shard_sizes: Sequence[int] | None,
    exact: bool,
) -> Tensor:
    _check(x, weight, threshold, bias, shard_sizes)
    kernel = choose(Problem(x, weight, shard_sizes))
    return kernel.run(x, weight, threshold, bias, shard_sizes=shard_sizes, exact=exact)


def _check(
    x: Tensor, weight: ScaledWeight, threshold: Tensor, bias: Tensor | None, shard_sizes: Sequence[int] | None
) -> None:
    device, in_features, out_features = weight.codes.device, weight.in_features, weight.out_features
    for name, tensor in (("x", x), ("threshold", threshold), ("bias", bias)):
        if tensor is not None and tensor.device != device:
            raise SponError.of(name, tensor.device, f"the device of the weight ({device})")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise SponError.of("x", f"shape {tuple(x.shape)}", f"[..., {in_features}], the weight's in_features")
    if bias is not None and (tuple(bias.shape) != (out_features,) or bias.dtype not in (torch.float32, x.dtype)):
        received = f"{bias.dtype} {tuple(bias.shape)}"
        raise SponError.of("bias", received, f"float32 or {x.dtype}, shape ({out_features},)")
    _check_weight(weight)
    check_threshold(threshold, in_features, out_features, [out_features] if shard_sizes is None else shard_sizes)


def _check_weight(weight: ScaledWeight) -> None:
    """Kernels read addresses: parts that do not belong together would end the process, or give what lies elsewhere."""
    groups, out_features = weight.scales.shape
    shapes = {
        "codes": (weight.in_features, -(-out_features // weight.unit)),
        "zeros": (groups, out_features),
        "offsets": (groups, out_features),
        "group_of_row": (weight.in_features,),
    }
    for name, shape in shapes.items():
        part = getattr(weight, name)
        if part is not None and tuple(part.shape) != shape:
            raise SponError.of(name, f"shape {tuple(part.shape)}", f"shape {shape}, as scales have {groups} groups")
    if groups > 1 and weight.group_of_row is None and groups * weight.group_size < weight.in_features:
        covered = f"{groups} groups of {weight.group_size}"
        raise SponError.of("group_size", covered, f"groups that cover {weight.in_features} inputs")


class _Arguments(NamedTuple):
    """Those of the operator; the dispatcher leaves out trailing ones that equal their defaults."""

    x: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    group_of_row: Tensor | None
    offsets: Tensor | None
    format: str
    threshold: Tensor
    bias: Tensor | None = None
    shard_sizes: Sequence[int] | None = None
    exact: bool = False

    @property
    def weight(self) -> ScaledWeight:
        return SCALED[self.format](*self[1:7])


def _run(*arguments: Any) -> Tensor:
    given = _Arguments(*arguments)
    rest = (given.threshold, given.bias, given.shard_sizes, given.exact)
    known = recall(given.x, given, *rest)  # a weight made of the tensors would cost as much as a small layer's work
    return _choose_and_run(given.x, given.weight, *rest) if known is None else known(given.x)


def _fake(*arguments: Any) -> Tensor:
    given = _Arguments(*arguments)
    weight = given.weight
    _check(given.x, weight, given.threshold, given.bias, given.shard_sizes)
    return given.x.new_empty((*given.x.shape[:-1], weight.out_features))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given = _Arguments(*inputs)
    ctx.save_for_backward(*given[1:4], given.group_of_row, given.offsets, given.x, given.threshold)
    ctx.rest = given.group_size, given.format, given.shard_sizes, None if given.bias is None else given.bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales, zeros, group_of_row, offsets, x, threshold = ctx.saved_tensors
    size, format, shard_sizes, bias_dtype = ctx.rest
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = SCALED[format](codes, scales, zeros, size, group_of_row, offsets)
        thresholds = Thresholds.of(threshold, codes, shard_sizes, weight.out_features)
        columns = weight.dense().split(thresholds.sizes, 1)
        # Chosen, not multiplied: an infinite gradient must not turn masked entries into NaN.
        parts = [
            torch.where(keep_mask(x, tau), part.float() @ column.t(), 0)
            for tau, part, column in zip(thresholds.rows, grad.split(thresholds.sizes, -1), columns, strict=True)
        ]
        grad_x = torch.stack(parts).sum(0).to(x.dtype)
    if bias_dtype is not None and ctx.needs_input_grad[9]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(bias_dtype)
    return grad_x, *[None] * 8, grad_bias, None, None


LIBRARY.impl("sparse_linear_rows", _run, "CompositeExplicitAutograd")
torch.library.register_fake("spon::sparse_linear_rows", _fake, lib=LIBRARY)
torch.library.register_autograd("spon::sparse_linear_rows", _backward, setup_context=_save, lib=LIBRARY)
