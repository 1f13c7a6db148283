# SPDX-License-Identifier: Apache-2.0
"""The one runtime of masks: a dense model run sparsely, unchanged, by hooks on its linears.

Calibration, training loops, evaluation and studies run models through it, and what the hosts' layers compute is tested
against it. What it needs to know of a method is a `SparseMethod`: those of `spon_plugin.sparsifiers` are, and so are
an adapter's masks (`masked_linears`).
"""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.decoder.shared_input import SharedInput
from spon_plugin.decoder.sparsity import SparsityCounter
from spon_plugin.decoder.tokens import DenseTokens
from spon_plugin.errors import SponError
from spon_plugin.masking import choose_rows
from spon_plugin.weights import linear_features, weight_of
from spon_plugin.weights.dense import DenseWeight


class SparseMethod(ABC):
    """What can run a dense model sparsely.

    Attributes:
        name: for errors.
        modules: paths of the linears that it sparsifies, which can carry an alpha.
        site_of: module path -> what `sparse_input` takes for the linear, hashable. The linears that have the same one
            share the sparse form of a tensor that all of them read.
        centers: module path -> float32 ``[in_features]``, what is put where an entry is dropped; zero elsewhere.
        weights: module path -> number of weights, of the linears that the model-wide sparsity is a share of.
        dense_prefix: first positions of a sequence that stay dense.
        static: whether the same is dropped for every token, so that no position is dense.
    """

    name: str
    modules: tuple[str, ...]
    site_of: Mapping[str, Any]
    centers: Mapping[str, Tensor]
    weights: Mapping[str, int]
    dense_prefix: int
    static = False

    @abstractmethod
    def sparse_input(self, site: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the linears of a site multiply instead of `x`, and what was kept of it.

        Args:
            site: one of `site_of`'s.
            x: ``[..., in_features]``.

        Returns:
            ``S(x) - center`` in `x`'s shape and dtype, differentiable in `x`, and a bool mask of `x`'s shape (in
            whatever basis the method drops entries); no mask where the method drops nothing here.
        """

    def remainder(self, path: str, dropped: Tensor) -> Tensor | None:
        """What the method adds to the output for the dropped part ``x - S(x)``, linear in it; None for nothing."""
        return None

    def weight(self, path: str, weight: Tensor) -> Tensor | None:
        """The weight that the method puts in place of the linear's own, in the linear's layout; None for its own."""
        return None

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While the block runs, `sparse_input` may be called for `model`; for methods that need more than the input."""
        yield

    def hooks(self, model: nn.Module) -> list[Any]:
        """Put hooks of the method's own after those of its masks; `attach` removes what is given back."""
        return []

    @contextmanager
    def attach(
        self,
        model: nn.Module,
        alphas: Mapping[str, Tensor] | None = None,
        counter: SparsityCounter | None = None,
        biases: Mapping[str, Tensor] | None = None,
        dense_prefix: int | None = None,
    ) -> Iterator[DenseTokens]:
        """While the block runs, every linear in `modules` computes ``method(x) + b + W alpha``.

        Args:
            model: the dense model that was calibrated.
            alphas: module path -> float32 ``[in_features]``, for some of `modules`. Those that require a gradient get
                one; the others are folded once, at the start.
            counter: counts what the masks drop.
            biases: module path -> float32 ``[out_features]``, added as they are.
            dense_prefix: takes the place of the method's own.

        Yields:
            The rule of which tokens are dense. Positions are those that the model hands to its blocks, or places in
            the row in a block of `positions.whole_windows`.

        Raises:
            SponError: an alpha or a bias belongs to a linear that the method does not sparsify, or an alpha has
                another length than its linear's input.
        """
        alphas, biases = alphas or {}, biases or {}
        for kind, given in (("alpha", alphas), ("bias", biases)):
            for path in given:
                if path not in self.modules:
                    raise SponError.of(f"{path}: {kind}", "one", f"none, as {self.name} leaves this linear dense")
        state = DenseTokens(self.dense_prefix if dense_prefix is None else dense_prefix)
        handles: list[Any] = [state.attach(model, self.modules)]
        shared = SharedInput(self.sparse_input, {path: self.site_of[path] for path in self.modules})
        own: list[tuple[nn.Module, nn.Parameter]] = []
        try:
            with self.watching(model):
                for path in self.modules:
                    module: Any = model.get_submodule(path)
                    replaces = type(self).weight is not SparseMethod.weight  # packed weights have other names
                    replaced = self.weight(path, module.weight) if replaces else None
                    vectors = (self.centers.get(path), alphas.get(path), biases.get(path))
                    constant = _Constant(path, module, *vectors, own_weight=replaced is None)
                    if replaced is not None:
                        own.append((module, module.weight))
                        module.weight = nn.Parameter(replaced, requires_grad=False)
                    handles += _Hooks(self, path, shared, constant, state, counter).register(module)
                handles += self.hooks(model)
                yield state
        finally:
            for handle in handles:
                handle.remove()
            for module, weight in own:
                module.weight = weight

    def drops(self, counter: SparsityCounter) -> dict[str, float]:
        """Module path -> the share of its weights that the method does not use, as counted in a run."""
        return counter.per_module()

    def masked_share(self, counter: SparsityCounter) -> float:
        """The share of the model's weights that go unused, 0 to 1; linears without a mask count as dense.

        Args:
            counter: of a run under `attach`.
        """
        drops = self.drops(counter)
        return sum(drops.get(path, 0.0) * count for path, count in self.weights.items()) / sum(self.weights.values())

    def read_share(self, counter: SparsityCounter) -> float:
        """The share of the model's weight bytes that a token reads, with what the method reads beside the weights."""
        return 1 - self.masked_share(counter) + self.extra_reads / sum(self.weights.values())

    @property
    def extra_reads(self) -> int:
        """Numbers of the weight's dtype that a token reads beside the weights."""
        return 0


class _Hooks:
    """What runs before and after a linear."""

    def __init__(
        self,
        method: SparseMethod,
        path: str,
        shared: SharedInput,
        constant: _Constant,
        state: DenseTokens,
        counter: SparsityCounter | None,
    ) -> None:
        self.method, self.path, self.shared, self.constant = method, path, shared, constant
        self.state, self.counter = state, counter
        has_remainder = type(method).remainder is not SparseMethod.remainder
        self.has_remainder = has_remainder and path not in method.centers
        self._local = threading.local()

    def register(self, module: nn.Module) -> list[Any]:
        handles: list[Any] = [module.register_forward_pre_hook(self._before)]
        if self.has_remainder or self.constant.exists:
            handles.append(module.register_forward_hook(self._after))
        return handles

    def _before(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        dense, form = self.state.rows(x), self.shared(self.path, x)
        dropped = None if self.counter is None else form.dropped()
        if self.counter is not None and dropped is not None:
            counted = dropped if dense is None else dropped[~dense]
            self.counter.add_dropped(self.path, counted.sum(), counted.numel() * x.shape[-1])
        read = form.kept + self.constant.vector() if self.constant.is_in_input(x) else form.kept
        if self.has_remainder:
            self._local.dropped = x - choose_rows(dense, x, form.kept)
        return (choose_rows(dense, x, read), *args[1:])

    def _after(self, _module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        added = self.constant.bias if self.constant.is_in_input(args[0]) else self.constant()
        rest = self.method.remainder(self.path, self._local.__dict__.pop("dropped")) if self.has_remainder else None
        wide = torch.promote_types(y.dtype, torch.float32)
        if rest is not None:
            added = rest.to(wide) if added is None else rest.to(wide) + added
        if added is None:
            return y
        out = (y.to(wide) + added).to(y.dtype)
        return choose_rows(self.state.rows(args[0]), y, out)


class _Constant:
    """What is added to every output of a linear: ``W (center + alpha) + bias``, with the dense weight.

    While alpha trains in float32, ``center + alpha`` is added to the input instead, which gives the same without a
    product of its own, forward and backward.

    Attributes:
        bias: the last part alone; None for none.
        exists: whether there is any part.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        center: Tensor | None,
        alpha: Tensor | None,
        bias: Tensor | None,
        own_weight: bool = True,
    ) -> None:
        held: Any = getattr(module, "weight", None)  # a packed one has another name
        device = (next(chain(module.parameters(), module.buffers())) if held is None else held).device
        in_features = linear_features(module, path)[0]
        if alpha is not None and tuple(alpha.shape) != (in_features,):
            expected = f"shape ({in_features},), the layer's in_features"
            raise SponError.of(f"{path}: alpha", tuple(alpha.shape), expected)
        # The copy keeps the dense weight when the module's is replaced, and computes without the hooks of the run: an
        # opaque weight is asked what it computes.
        linear = copy.copy(module)
        linear._parameters = dict(module._parameters)
        linear._forward_hooks, linear._forward_pre_hooks = OrderedDict(), OrderedDict()
        self._weight = weight_of(linear)
        self._vectors = [vector.to(device) for vector in (center, alpha) if vector is not None]
        self.bias = None if bias is None else bias.to(device)
        self.exists = bool(self._vectors) or bias is not None
        self._trained = alpha is not None and alpha.requires_grad
        is_exact = isinstance(self._weight, DenseWeight) and self._weight.dtype == torch.float32
        self._may_be_in_input = self._trained and own_weight and is_exact
        self._folded = None if self._trained else self._fold()

    def __call__(self) -> Tensor | None:
        return self._fold() if self._trained else self._folded

    def is_in_input(self, x: Tensor) -> bool:
        """Whether `vector` is added to the input `x`, and `bias` alone to the output."""
        return self._may_be_in_input and x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)

    def vector(self) -> Tensor:
        """``center + alpha``, ``[in_features]``, differentiable in alpha where that is enabled."""
        first, *others = self._vectors
        return first + others[0] if others else first

    def _fold(self) -> Tensor | None:
        if not self._vectors:
            return self.bias
        with torch.set_grad_enabled(self._trained and torch.is_grad_enabled()):
            product = self._weight.product(self.vector())
            return product if self.bias is None else product + self.bias
