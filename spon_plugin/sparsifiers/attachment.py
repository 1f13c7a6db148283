# SPDX-License-Identifier: Apache-2.0
"""The hooks by which a fitted method runs a model; see `base.Fitted.attach`."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.decoder.sites import Site
from spon_plugin.decoder.sparse_inputs import SparsityCounter
from spon_plugin.decoder.tokens import DenseTokens
from spon_plugin.errors import SponError
from spon_plugin.masking import choose_rows
from spon_plugin.sparsifiers.base import Fitted
from spon_plugin.weights import weight_of


class _SiteInput:
    """The sparse input of a site, made when its first linear asks and shared with the others."""

    def __init__(self, fitted: Fitted, site: Site, state: DenseTokens, counter: SparsityCounter | None) -> None:
        self.fitted, self.site, self.state, self.counter = fitted, site, state, counter
        self.modules = [path for path in site.modules if path in fitted.modules]
        self._of: Tensor | None = None
        self._kept: Tensor | None = None
        self._asked = 0

    def __call__(self, x: Tensor) -> Tensor:
        """``S(x) - center``; `x` itself for tokens that stay dense."""
        if self._of is not x:
            dense = self.state.rows(x)
            kept, mask = self.fitted.sparse_input(self.site, x)
            if self.counter is not None and mask is not None:
                counted = mask if dense is None else mask[~dense]
                for path in self.modules:
                    self.counter.add(path, counted)
            self._of, self._kept = x, choose_rows(dense, x, kept)
            self._asked = 0
        assert self._kept is not None
        kept = self._kept
        self._asked += 1
        if self._asked == len(self.modules):  # nobody asks again: let the tensors go
            self._of = self._kept = None
        return kept


@contextmanager
def attached(
    fitted: Fitted,
    model: nn.Module,
    alphas: Mapping[str, Tensor],
    counter: SparsityCounter | None,
    biases: Mapping[str, Tensor],
) -> Iterator[DenseTokens]:
    """See `Fitted.attach`."""
    for kind, given in (("alpha", alphas), ("bias", biases)):
        for path in given:
            if path not in fitted.modules:
                raise SponError.of(f"{path}: {kind}", "one", f"none, as {fitted.name} leaves this linear dense")
    state = DenseTokens(fitted.dense_prefix)
    handles: list[Any] = [state.attach(model)]
    own: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        with fitted.watching(model):
            for site in fitted.sites:
                shared = _SiteInput(fitted, site, state, counter)
                for path in shared.modules:
                    module: Any = model.get_submodule(path)
                    constant = _Constant(module, fitted.centers.get(path), alphas.get(path), biases.get(path))
                    replaced = fitted.weight(path, module.weight)
                    if replaced is not None:
                        own.append((module, module.weight))
                        module.weight = nn.Parameter(replaced, requires_grad=False)
                    handles += _hooks(fitted, path, module, shared, constant, state)
            yield state
    finally:
        for handle in handles:
            handle.remove()
        for module, weight in own:
            module.weight = weight


def _hooks(
    fitted: Fitted, path: str, module: nn.Module, shared: _SiteInput, constant: _Constant, state: DenseTokens
) -> list[Any]:
    dropped: list[Tensor] = []
    center = fitted.centers.get(path)

    def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept = shared(args[0])
        dropped[:] = [args[0] - kept]
        return (kept, *args[1:])

    def before_simply(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (shared(args[0]), *args[1:])

    def after(_module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        added = constant()
        rest = fitted.remainder(path, dropped.pop()) if dropped else None
        wide = torch.promote_types(y.dtype, torch.float32)
        if rest is not None:
            added = rest.to(wide) if added is None else rest.to(wide) + added
        if added is None:
            return y
        dense = state.rows(args[0])
        out = (y.to(wide) + added).to(y.dtype)
        return choose_rows(dense, y, out)

    has_rest = type(fitted).remainder is not Fitted.remainder and center is None
    handles = [module.register_forward_pre_hook(before if has_rest else before_simply)]
    if has_rest or constant.exists:
        handles.append(module.register_forward_hook(after))
    return handles


class _Constant:
    """What is added to every output of a linear: ``W (center + alpha) + bias``, with the dense weight."""

    def __init__(self, module: nn.Module, center: Tensor | None, alpha: Tensor | None, bias: Tensor | None) -> None:
        weight: Any = module.weight
        # The copy keeps the dense weight when the module's is replaced, and computes without the hooks of the run: an
        # opaque weight is asked what it computes.
        linear = copy.copy(module)
        linear._parameters = dict(module._parameters)
        linear._forward_hooks, linear._forward_pre_hooks = OrderedDict(), OrderedDict()
        self._weight = weight_of(linear)
        device = weight.device
        self._vectors = [vector.to(device) for vector in (center, alpha) if vector is not None]
        self._bias = None if bias is None else bias.to(device)
        self.exists = bool(self._vectors) or bias is not None
        self._trained = alpha is not None and alpha.requires_grad
        self._folded = None if self._trained else self._fold()

    def __call__(self) -> Tensor | None:
        return self._fold() if self._trained else self._folded

    def _fold(self) -> Tensor | None:
        if not self._vectors:
            return self._bias
        product = self._weight.product(torch.stack(self._vectors).sum(0))
        return product if self._bias is None else product + self._bias
