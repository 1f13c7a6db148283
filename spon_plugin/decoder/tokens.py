# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a forward pass keep their whole input.

A mask is a matter of entries (`masking`); whether a token is masked at all is a matter of its position. This module
answers the second question for everything that runs a transformers-like model: calibration, evaluation and PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spon_plugin.layers.sparse_linear import SparseConv1D, SparseLinear
from spon_plugin.masking import TokenMode


def dense_tokens(
    shape: tuple[int, int],
    dense_prefix: int,
    tokens: TokenMode = "all",
    attention_mask: Tensor | None = None,
    past: int = 0,
    device: torch.device | str | None = None,
) -> Tensor | None:
    """Which tokens of one pass are dense.

    Positions count real tokens: with left padding the first real token is position 0. In ``decode`` mode a pass that
    starts a sequence is its context and runs dense; passes that continue on a cache are masked.

    Args:
        shape: ``(batch, sequence)`` of this pass.
        dense_prefix: how many first positions are dense.
        tokens: ``all`` or ``decode``.
        attention_mask: ``[batch, past + sequence]``, 0 for padding; None for no padding.
        past: number of tokens already in the cache.
        device: of the result.

    Returns:
        bool ``[batch, sequence]``, True for dense (padding counts as dense); None where all tokens are masked.
    """
    batch, length = shape
    if tokens == "decode" and past == 0:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    padded = attention_mask is not None and tuple(attention_mask.shape) == (batch, past + length)
    if dense_prefix == 0 or (past >= dense_prefix and (not padded or dense_prefix == 1)):
        # With a prefix of one, a token that follows a cache is never first, padding or not.
        return None
    if padded:
        assert attention_mask is not None
        return attention_mask.long().cumsum(-1)[:, past:] <= dense_prefix
    positions = torch.arange(past, past + length, device=device)
    return (positions < dense_prefix).expand(batch, length)


class Attachment:
    """The hooks by which a `DenseTokens` follows a model."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Stop following the model."""
        for handle in self._handles:
            handle.remove()


class DenseTokens:
    """The answer of `dense_tokens` for the pass that is running, kept up to date by hooks on the model.

    Layers hold a reference to it and ask `rows`. Layers that are called outside of a model's forward find None. A copy
    or pickle of the model takes the hooks along, and its layers refer to the copy.
    """

    def __init__(self, dense_prefix: int = 0, tokens: TokenMode = "all") -> None:
        self.dense_prefix = dense_prefix
        self.tokens: TokenMode = tokens
        self.mask: Tensor | None = None
        self._fixed = False

    def attach(self, model: nn.Module) -> Attachment:
        """Follow every forward pass of `model`; returns what ends it."""
        return Attachment(
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, always_call=True),
        )

    def rows(self, x: Tensor) -> Tensor | None:
        """The mask in the leading shape of `x` ``[..., in_features]``, or None where all its tokens are masked.

        An input with another number of tokens than the pass (the encoder's output in cross-attention) is masked.
        """
        if self.mask is None or self.mask.numel() != x.shape[:-1].numel():
            return None
        return self.mask.reshape(x.shape[:-1]).to(x.device)

    @contextmanager
    def fixed(self, mask: Tensor | None) -> Iterator[None]:
        """Passes in this block use `mask`, bool ``[batch, sequence]`` with True for dense, whatever their inputs say.

        The mask stays after the block until the next pass, so that a backward pass which recomputes activations
        (gradient checkpointing) recomputes the same ones.
        """
        was, self._fixed, self.mask = self._fixed, True, mask
        try:
            yield
        finally:
            self._fixed = was

    def _before_forward(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._fixed:
            return
        if torch.compiler.is_compiling():
            # Traced, a cache's length would be a constant of the graph, and every token a new graph.
            from spon_plugin.decoder.untraced import call

            self.mask = call(self.of_inputs, *args, **kwargs)
        else:
            self.mask = self.of_inputs(*args, **kwargs)

    def _after_forward(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        # With gradients on, a checkpointed layer may run again in the backward pass and needs the mask.
        if not self._fixed and not torch.is_grad_enabled():
            self.mask = None

    def of_inputs(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The mask of a pass, from the arguments of a transformers-like model's forward."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            ids = kwargs.get("inputs_embeds")
        # Token ids are whole numbers [batch, sequence]; two-dimensional floats are the rows of something else.
        if not isinstance(ids, Tensor) or ids.dim() < 2 or (ids.dim() == 2 and ids.is_floating_point()):
            return None
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
        mask = kwargs.get("attention_mask")
        return dense_tokens((ids.shape[0], ids.shape[1]), self.dense_prefix, self.tokens, mask, past, ids.device)


def follow_tokens(model: nn.Module, tokens: DenseTokens) -> Attachment:
    """Let the sparse layers of `model` leave the dense tokens of each of its forward passes dense.

    Args:
        model: holds `SparseLinear` and `SparseConv1D` layers, whose `keep_dense_bias` has been called.
        tokens: which tokens are dense.

    Returns:
        What ends it for the model; the layers then mask every token.
    """
    for module in model.modules():
        if isinstance(module, SparseLinear | SparseConv1D):
            module.tokens = tokens
    return tokens.attach(model)
