# SPDX-License-Identifier: Apache-2.0
"""Run any model under masks and alphas, without changing it: hooks on its linears.

This is the plain way to evaluate an adapter, and what the hosts' layers are tested against.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.adapter.mask import Mask
from spon_plugin.decoder.tokens import DenseTokens
from spon_plugin.masking import choose_rows, keep_mask, sparse_deviation
from spon_plugin.weights.fold import fold_alpha


class SparsityCounter:
    """How many input entries each linear's mask dropped, over the tokens that were masked."""

    def __init__(self) -> None:
        self._dropped: dict[str, Tensor] = {}
        self._total: dict[str, int] = {}

    def add(self, path: str, keep: Tensor) -> None:
        """Count one mask, bool ``[..., in_features]``, of the linear at `path`."""
        dropped = keep.numel() - keep.sum()  # stays on the device: no synchronisation per layer
        self._dropped[path] = self._dropped.get(path, torch.zeros_like(dropped)) + dropped
        self._total[path] = self._total.get(path, 0) + keep.numel()

    def per_module(self) -> dict[str, float]:
        """Achieved sparsity, 0 to 1, of every linear that saw a token."""
        return {path: int(self._dropped[path]) / total for path, total in self._total.items() if total}

    def overall(self, weights: Mapping[str, int]) -> float:
        """Achieved sparsity of the model: the linears weighted by their number of weights.

        Args:
            weights: module path -> number of weights.
        """
        measured = self.per_module()
        total = sum(weights[path] for path in measured)
        return sum(measured[path] * weights[path] for path in measured) / total if total else 0.0


@contextmanager
def sparse_inputs(
    model: nn.Module,
    masks: Mapping[str, Mask],
    dense_prefix: int = 0,
    counter: SparsityCounter | None = None,
) -> Iterator[DenseTokens]:
    """While the block runs, every linear in `masks` computes ``W S(x) + b + W alpha``.

    Tokens in the dense prefix compute ``W x + b``, as in the dense model. What does not depend on the input,
    ``W (center + alpha)``, is folded once, at the start.

    Args:
        model: a dense model.
        masks: module path -> threshold, centre and alpha.
        dense_prefix: the first positions of each sequence that stay dense.
        counter: counts what the masks drop.

    Yields:
        The token state of the run, whose `dense_prefix` may be changed between passes.
    """
    state = DenseTokens(dense_prefix)
    handles: list[Any] = [state.attach(model)]

    def masked(path: str, mask: Mask) -> Any:
        threshold, center = mask.threshold, mask.center

        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            dense = state.rows(x)
            if counter is not None:
                keep = keep_mask(x, threshold, center)
                counter.add(path, keep if dense is None else keep[~dense])
            return (sparse_deviation(x, threshold, dense, center), *args[1:])

        return hook

    def add(bias: Tensor) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            dense = state.rows(args[0])
            out = (y.float() + bias).to(y.dtype)
            return choose_rows(dense, y, out)

        return hook

    try:
        for path, mask in masks.items():
            module = model.get_submodule(path)
            device = next(module.parameters()).device
            if mask.constant is not None:
                handles.append(module.register_forward_hook(add(fold_alpha(module, mask.constant, path))))
            handles.append(module.register_forward_pre_hook(masked(path, mask.to(device))))
        yield state
    finally:
        for handle in handles:
            handle.remove()
