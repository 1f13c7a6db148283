# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a forward pass keep their whole input.

A mask is a matter of entries (`masking`), and by default of nothing else: every token is masked. `DenseTokens` is for
adapters that leave some tokens dense by their position in the sequence, with whatever runs them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spon_plugin.adapter.config import SponFields
from spon_plugin.decoder.positions import POSITIONS, WITHOUT, BlockHook, current_call
from spon_plugin.errors import SponError
from spon_plugin.layers.sparse_linear import SparseLayer
from spon_plugin.masking import TokenMode


class Attachment:
    """The hooks by which a `DenseTokens` follows a model."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Stop following the model."""
        for handle in self._handles:
            handle.remove()


class DenseTokens:
    """Which tokens are dense: a rule, that is applied to the positions which the model hands to its decoder blocks.

    It holds nothing of a pass, so threads, passes within passes and recomputed ones do not meet in it. A copy or pickle
    of the model takes the hooks along, and its layers refer to the copy.

    Attributes:
        dense_prefix: how many first positions of a sequence are dense.
        tokens: ``all``, or ``decode``: prompts are dense, too; see `positions.read_as`.
    """

    def __init__(self, dense_prefix: int = 0, tokens: TokenMode = "all") -> None:
        self.dense_prefix = dense_prefix
        self.tokens: TokenMode = tokens

    @property
    def leaves_any(self) -> bool:
        """Whether any token is dense at all."""
        return self.dense_prefix > 0 or self.tokens != "all"

    def attach(self, model: nn.Module, paths: Iterable[str]) -> Attachment:
        """Follow the decoder blocks of `model` that hold the linears at `paths`; returns what ends it."""
        blocks = dict.fromkeys(block for block in (block_of(model, path) for path in paths) if block is not None)
        handles: list[RemovableHandle] = []
        width = attention_width(model)
        for block in blocks:
            module = model.get_submodule(block)
            handles += BlockHook(block, module, width).attach(module)
        return Attachment(*handles)

    def rows(self, x: Tensor) -> Tensor | None:
        """Which rows of a linear's input ``[..., in_features]`` are dense, in its leading shape; None for none.

        Raises:
            SponError: it depends on positions, and the linear is called outside of a decoder block, its input has
                other tokens than the block's, or the model does not hand positions to the block.
        """
        if not self.leaves_any:
            return None
        call = current_call()
        if call is None:
            raise SponError.of(self._field, "a linear called outside of its decoder block", "the model's own", WITHOUT)
        if x.shape[:-1].numel() != call.shape[0] * call.shape[1]:
            expected = f"the tokens of the block, {call.shape}"
            raise call.unknown(self._field, f"an input with tokens {tuple(x.shape[:-1])}", expected)
        dense = call.dense(self.dense_prefix, self.tokens)
        return None if dense is None else dense.reshape(x.shape[:-1]).to(x.device)

    @property
    def _field(self) -> str:
        return "dense_prefix" if self.dense_prefix else "tokens"

    def check(self, model: nn.Module, paths: Iterable[str]) -> None:
        """Check that the linears at `paths` can learn which tokens come first, as far as the model's code shows it.

        What else is not known to a block is refused in the first pass.

        Raises:
            SponError: a linear lies outside of the decoder blocks; a block takes no positions; or its attention is so
                narrow that a prefix cannot be told from what it sees.
        """
        if not self.dense_prefix:
            return
        value = f"dense_prefix {self.dense_prefix}"
        for path in paths:
            block = block_of(model, path)
            if block is None:
                raise SponError.of(f"{value}: {path}", "a linear outside of any block", "one in a block", WITHOUT)
            module = model.get_submodule(block)
            taken = inspect.signature(module.forward).parameters
            if POSITIONS not in taken and all(p.kind is not p.VAR_KEYWORD for p in taken.values()):
                received, expected = f"a linear in {type(module).__name__}", f"a block that takes {POSITIONS}"
                raise SponError.of(f"{value}: {path}", received, expected, WITHOUT)
        width = attention_width(model)
        if width is not None and self.dense_prefix >= width:
            raise SponError.of(
                "dense_prefix", self.dense_prefix, f"less than {width}, what the attention sees", WITHOUT
            )


def attention_width(model: nn.Module) -> int | None:
    """How many tokens the narrowest of a model's layers attends to: its sliding window; 1 in chunks; None for all."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if isinstance(getattr(config, "attention_chunk_size", None), int):
        return 1  # the first of a chunk sees itself alone
    window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) else None


def rule_of(fields: SponFields, model: nn.Module) -> DenseTokens:
    """Which tokens an adapter leaves dense in `model`."""
    # Format 1 left a token dense by default, and masked all of them in an encoder-decoder, whatever its fields said.
    config: Any = getattr(model, "config", None)
    if fields.format_version == 1 and getattr(config, "is_encoder_decoder", False):
        return DenseTokens()
    return DenseTokens(fields.dense_prefix, fields.tokens)  # type: ignore[arg-type]


def block_of(model: nn.Module, path: str) -> str | None:
    """Path of the decoder block around the module at `path`: a member of the outermost `ModuleList`; None for none."""
    module: Any = model
    names = path.split(".")
    for depth, name in enumerate(names, start=1):
        if isinstance(module, nn.ModuleList):
            return ".".join(names[:depth])
        module = getattr(module, name)
    return None


def follow_tokens(model: nn.Module, tokens: DenseTokens) -> Attachment:
    """Let the sparse layers of `model` leave the dense tokens of each of its forward passes dense.

    Args:
        model: holds sparse layers, whose `keep_dense_bias` has been called.
        tokens: which tokens are dense.

    Returns:
        What ends it for the model.

    Raises:
        SponError: see `DenseTokens.check`.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, SparseLayer)}
    tokens.check(model, layers)
    for layer in layers.values():
        layer.tokens = tokens
    return tokens.attach(model, layers)
