# SPDX-License-Identifier: Apache-2.0
"""Low-rank changes of the weights that are trained under the masks beside alphas, and merged: they cost nothing to run.

Alphas can only shift what a linear gives. ``W + B A`` in place of `W` lets the entries that the masks keep stand in for
those that they drop. The parametrization is LoRA's (arXiv 2106.09685).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spon_plugin.decoder.attachment import SparseMethod
from spon_plugin.decoder.sparsity import SparsityCounter
from spon_plugin.decoder.tokens import DenseTokens
from spon_plugin.errors import SponError
from spon_plugin.sparsifiers.thresholds import ThresholdFitted
from spon_plugin.training.recipe import Recipe
from spon_plugin.weights import Opaque, linear_features, weight_of
from spon_plugin.weights.dense import DenseWeight

RANK, RATE = 16, 3e-4
"""Of the deltas, by default."""


class Deltas(SparseMethod):
    """A method with thresholds on weights ``W + B A``: ``y = (W + B A) (S(x) + alpha) + b``.

    Args:
        base: the method; no position of its is dense.
        model: the dense model, with floating-point weights.
        rank: of every ``B A``.
        rate: Adam's, of A and B.
        seed: of the first values of A; B begins at zero.

    Attributes:
        base: at its thresholds of now.
        down: module path -> A, float32 ``[rank, in_features]``.
        up: module path -> B, float32 ``[out_features, rank]``.

    Raises:
        SponError: the rank or the rate is not positive, `base` leaves positions dense, or a weight is quantized or
            cannot be read.
    """

    dense_prefix = 0
    name = "low-rank deltas"
    # They are in what the linears read, with alphas, so that B A multiplies them as well.
    centers: Mapping[str, Tensor] = {}

    def __init__(self, base: ThresholdFitted, model: nn.Module, rank: int, rate: float, seed: int = 0) -> None:
        check_deltas(rank, rate)
        if base.dense_prefix:
            raise _not_dense(base.dense_prefix)
        for path in base.modules:
            floating_point(model, path)
        self.base, self.rate = base, rate
        self.modules, self.weights, self.site_of = base.modules, base.weights, base.site_of
        generator = torch.Generator().manual_seed(seed)
        device = next(model.parameters()).device
        self.down: dict[str, Tensor] = {}
        self.up: dict[str, Tensor] = {}
        for path in base.modules:
            inputs, outputs = linear_features(model.get_submodule(path), path)
            drawn = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
            self.down[path] = drawn.to(device).requires_grad_()
            self.up[path] = torch.zeros(outputs, rank, device=device, requires_grad=True)

    def parameters(self, recipe: Recipe) -> list[tuple[Tensor, float]]:
        """See `training.loop.Trainable`."""
        return [(part, self.rate) for path in self.modules for part in (self.down[path], self.up[path])]

    def with_factor(self, logarithm: float) -> Deltas:
        """The same with thresholds that are ``exp(logarithm)`` times as high, sharing its parameters."""
        other = copy.copy(self)
        other.base = self.base.with_factor(logarithm)
        return other

    def sparse_input(self, site: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `SparseMethod.sparse_input`."""
        return self.base.sparse_input(site, x)

    @contextmanager
    def attach(
        self,
        model: nn.Module,
        alphas: Mapping[str, Tensor] | None = None,
        counter: SparsityCounter | None = None,
        biases: Mapping[str, Tensor] | None = None,
        dense_prefix: int | None = None,
    ) -> Iterator[DenseTokens]:
        """See `SparseMethod.attach`; no position may be dense.

        Raises:
            SponError: a position is to be dense, or an alpha belongs to a linear without a mask.
        """
        if dense_prefix:
            raise _not_dense(dense_prefix)
        alphas = alphas or {}
        for path in alphas:
            if path not in self.modules:
                raise SponError.of(f"{path}: alpha", "one", "none, as this linear has no mask")
        with super().attach(model, None, counter, biases, 0) as tokens, ExitStack() as stack:
            for path in self.modules:
                module = model.get_submodule(path)
                given = (self.base.centers.get(path), alphas.get(path))
                vectors = [vector.to(self.down[path].device) for vector in given if vector is not None]
                handles = [module.register_forward_hook(_adds(self.down[path], self.up[path]))]
                if vectors:
                    handles.append(module.register_forward_pre_hook(_shifts(vectors)))
                for handle in handles:
                    stack.callback(handle.remove)
            yield tokens

    @torch.no_grad()
    def merge(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Put ``W + B A`` in place of each W, in numbers of `dtype`, by default the weights' own."""
        for path in self.modules:
            codes = floating_point(model, path).codes  # a view of the parameter, inputs first
            tuned = codes.float() + (self.up[path] @ self.down[path]).t()
            codes.copy_(tuned.to(dtype or codes.dtype))

    @contextmanager
    def merged(self, model: nn.Module) -> Iterator[None]:
        """While the block runs, the weights of `model` are the merged ones."""
        before = {path: floating_point(model, path).codes.clone() for path in self.modules}
        try:
            self.merge(model)
            yield
        finally:
            with torch.no_grad():
                for path, codes in before.items():
                    floating_point(model, path).codes.copy_(codes)


def check_deltas(rank: int, rate: float) -> None:
    """Raise `SponError` unless both are positive."""
    if rank < 1:
        raise SponError.of("rank", rank, "a positive number")
    if not 0 < rate < math.inf:
        raise SponError.of("rate of the deltas", rate, "a positive number")


def floating_point(model: nn.Module, path: str) -> DenseWeight:
    """The weight of a linear that can be changed.

    Raises:
        SponError: it is quantized, or elsewhere.
    """
    weight = weight_of(model.get_submodule(path))
    if isinstance(weight, DenseWeight):
        return weight
    received = weight.reason if isinstance(weight, Opaque) else f"{weight.format}, quantized"
    raise SponError.of(
        f"{path}: weight", received, "a floating-point one", "Train them first, then quantize the merged model."
    )


def _not_dense(dense_prefix: int) -> SponError:
    return SponError.of("dense_prefix", dense_prefix, "0, under low-rank deltas")


def _shifts(vectors: list[Tensor]) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] + sum(vectors[1:], vectors[0]).to(args[0].dtype), *args[1:])

    return hook


def _adds(down: Tensor, up: Tensor) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        low: Tensor = F.linear(args[0], down.to(args[0].dtype))
        return y + F.linear(low, up.to(low.dtype))

    return hook
