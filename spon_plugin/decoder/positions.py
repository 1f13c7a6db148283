# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of a pass stand in their sequences, as the model itself tells its decoder blocks.

A linear sees rows, not positions. Every call of a decoder block, though, is handed `position_ids` and an attention mask
by the model: hooks on the blocks note them for the linears inside, per call and per thread, in the backward pass of a
checkpointed block as well. Nothing is read off the inputs of the whole model, and nothing outlives a block's call.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from spon_plugin.errors import SponError

POSITIONS = "position_ids"
WITHOUT = "Use an adapter with dense_prefix 0 and tokens all: it needs no positions."
_CACHES = ("past_key_values", "layer_past", "past_key_value", "cache_params")
_OTHER_SEQUENCES = ("encoder_hidden_states", "cross_attention_states")

Roles = Tensor | Literal["prompt", "generated"]
"""See `read_as`."""

_LOCAL = threading.local()
# A checkpointed block runs again in the backward pass, where what was said around the forward pass is not in force, and
# perhaps in another thread. The block is handed the same tensor of positions once more, by which it is found.
_ROLES_OF: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@contextmanager
def read_as(roles: Roles) -> Iterator[None]:
    """Say which tokens are the prompt, in the passes that this thread makes in the block.

    It is for adapters with ``tokens: decode``. By itself a pass from position 0 on is a prompt, and one token that goes
    on from a cache was generated; of several that go on from a cache, or of a pass without a cache, nobody can tell.

    Args:
        roles: bool ``[batch, sequence]``, True for the prompt; or what several tokens that go on from a cache are:
            ``prompt`` (read in chunks, or a further turn of a dialogue) or ``generated`` (continuations that are
            scored, candidates of speculation).
    """
    with _said("roles", roles):
        yield


@contextmanager
def whole_windows() -> Iterator[None]:
    """Say that every row of the passes in this block is a sequence from its first token on, without padding.

    Positions are then places in the row, for models that hand none to their blocks as well.
    """
    with _said("windows", True):
        yield


@contextmanager
def _said(name: str, value: Any) -> Iterator[None]:
    before = getattr(_LOCAL, name, None)
    setattr(_LOCAL, name, value)
    try:
        yield
    finally:
        setattr(_LOCAL, name, before)


def current_call() -> BlockCall | None:
    """The block's call that this thread is in; None outside of every block that is followed."""
    return getattr(_LOCAL, "call", None)


class BlockHook:
    """Notes the calls of one block for the linears inside it. It keeps nothing of a call, and can be copied.

    Attributes:
        path: of the block.
        width: how many tokens its attention sees at most; None for all.
    """

    def __init__(self, path: str, block: nn.Module, width: int | None = None) -> None:
        self.path, self.width = path, width
        self._names = tuple(inspect.signature(block.forward).parameters)

    def attach(self, block: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        """Follow `block`; several hooks on it end in the reverse of the order in which they begin."""
        return (
            block.register_forward_pre_hook(self._before, with_kwargs=True),
            block.register_forward_hook(self._after, always_call=True, prepend=True),
        )

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        hidden = given.get("hidden_states", args[0] if args else None)
        if isinstance(hidden, Tensor) and hidden.dim() >= 2:
            _LOCAL.call = BlockCall(self, given, hidden)

    def _after(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        call = current_call()
        if call is not None and call.owner is self:
            _LOCAL.call = call.outer


class BlockCall:
    """One call of a decoder block.

    Attributes:
        owner: the hook that noted it.
        outer: the call around this one.
        shape: ``(batch, sequence)``.
    """

    def __init__(self, owner: BlockHook, given: dict[str, Any], hidden: Tensor) -> None:
        self.owner, self.outer = owner, current_call()
        self.shape = (1, hidden.shape[0]) if hidden.dim() == 2 else (hidden.shape[0], hidden.shape[1])
        self._device, self._given = hidden.device, given
        self._windows: bool = getattr(_LOCAL, "windows", None) is True
        self._roles: Roles | None = _roles(given.get(POSITIONS))
        self._dense: dict[tuple[int, str], Tensor | None] = {}

    def dense(self, dense_prefix: int, tokens: str) -> Tensor | None:
        """Which tokens are dense: bool ``[batch, sequence]``; None where it is known that none is.

        Args:
            dense_prefix: how many first positions are.
            tokens: ``all``, or ``decode``: then prompts are dense, too.

        Raises:
            SponError: the block was not told what it depends on.
        """
        key = (dense_prefix, tokens)
        if key not in self._dense:
            dense = self._first(dense_prefix) if dense_prefix else None
            if tokens == "decode":
                dense = self._prompt() if dense is None else dense | self._prompt()
            if dense is not None and _may_look(dense) and not bool(dense.any()):
                dense = None
            self._dense[key] = dense
        return self._dense[key]

    def _first(self, count: int) -> Tensor:
        if self._windows:
            return (torch.arange(self.shape[1], device=self._device) < count).expand(self.shape)
        first = self._positions("dense_prefix") < count
        # Left padding without positions of its own moves the first real token of a row back. It is known by what it may
        # attend to: a token that sees `count` tokens or fewer, itself included, is among the first `count`.
        visible = self._visible()
        if visible is None:
            return first
        if self.owner.width is not None and count >= self.owner.width:
            raise self.unknown("dense_prefix", count, f"less than {self.owner.width}, what the attention sees")
        return first | (visible <= count)

    def _positions(self, field: str) -> Tensor:
        for name in _OTHER_SEQUENCES:
            if self._given.get(name) is not None:
                raise self.unknown(field, f"a call with {name}", "a block that reads one sequence")
        positions = self._given.get(POSITIONS)
        if not isinstance(positions, Tensor):
            expected = f"a block that its model hands {POSITIONS} to"
            raise self.unknown(field, f"{POSITIONS} {positions}", expected)
        batch, length = self.shape
        if positions.dim() != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != length:
            raise self.unknown(field, f"{POSITIONS} {tuple(positions.shape)}", f"{self.shape}, one for each token")
        return positions.expand(self.shape)

    def _visible(self) -> Tensor | None:
        """How many tokens each token may attend to, itself included, ``[batch, sequence]``; None for all before it."""
        mask, queries = self._given.get("attention_mask"), self.shape[1]
        if mask is None:
            return None
        if hasattr(mask, "mask_mod"):  # flex attention
            mask = _written_out(mask, self.shape, self._device)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= queries:  # flash attention: the keys
            return mask.long().cumsum(-1)[:, -queries:].expand(self.shape)
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2] != queries:
            received = f"an attention mask {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
            raise self.unknown("dense_prefix", received, "[batch, keys] or [batch, heads, queries, keys]")
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return seen[:, 0].sum(-1).expand(self.shape)

    def _prompt(self) -> Tensor:
        if isinstance(self._roles, Tensor):
            if tuple(self._roles.shape) != self.shape:
                raise self.unknown("read_as", tuple(self._roles.shape), f"{self.shape}, the shape of the pass")
            return self._roles.to(self._device, torch.bool)
        if self._windows:
            return torch.ones(self.shape, dtype=torch.bool, device=self._device)
        if torch.compiler.is_compiling():  # whether it can be told depends on values
            from spon_plugin.decoder.untraced import call

            prompt: Tensor = call(self._begun_here)
            return prompt
        return self._begun_here()

    def _begun_here(self) -> Tensor:
        """The tokens of sequences that begin in this pass; a row may hold several."""
        positions = self._positions("tokens")
        if self.shape[1] == 1:
            return positions == 0
        remedy = "Say which tokens are the prompt: `with spon_plugin.read_as(...)`."
        if self._roles is None and all(self._given.get(name) is None for name in _CACHES):
            received = f"decode, and {self.shape[1]} tokens without a cache"
            raise self.unknown("tokens", received, "a prompt, or tokens that go on from a cache", remedy)
        number = self._sequence_numbers(positions)
        # Where each sequence begins, and how much of it is here.
        begin = torch.full_like(positions, torch.iinfo(positions.dtype).max)
        begin = begin.scatter_reduce(-1, number, positions, "amin").gather(-1, number)
        count = torch.zeros_like(positions).scatter_add(-1, number, torch.ones_like(positions)).gather(-1, number)
        prompt, several = begin == 0, (begin > 0) & (count > 1)
        if self._roles is None and bool(several.any()):
            received = f"decode, and {int(several.sum())} tokens that go on from a cache at once"
            raise self.unknown("tokens", received, "a prompt in one pass, then one token at a time", remedy)
        return prompt | several if self._roles == "prompt" else prompt

    def _sequence_numbers(self, positions: Tensor) -> Tensor:
        """The number of the sequence that each token belongs to, in its row: a sequence ends where positions jump."""
        begins = torch.zeros_like(positions, dtype=torch.bool)
        begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        lengths = self._given.get("cu_seq_lens_q")
        if isinstance(lengths, Tensor) and self.shape[0] == 1:  # of continuous batching, where they may seem to go on
            inner = lengths[(lengths > 0) & (lengths < self.shape[1])]
            begins[:, inner.long()] = True
        return begins.long().cumsum(-1)

    def unknown(self, field: str, received: Any, expected: str, remedy: str = WITHOUT) -> SponError:
        """The error for a pass that does not tell which of its tokens are dense."""
        return SponError.of(f"{field} in {self.owner.path}", received, expected, remedy)


def _roles(positions: Any) -> Roles | None:
    """What was said about the pass that hands out this tensor of positions."""
    said: Roles | None = getattr(_LOCAL, "roles", None)
    if torch.compiler.is_compiling() or not isinstance(positions, Tensor):
        return said
    if torch._C._current_graph_task_id() != -1:  # in a backward pass
        return _ROLES_OF.get(positions)
    if said is not None:
        _ROLES_OF[positions] = said
    return said


def _may_look(tensor: Tensor) -> bool:
    """Whether a tensor's values may decide what to run: not while a graph is made of the pass."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _written_out(mask: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    """A mask of flex attention as bool ``[batch, 1, queries, keys]``."""
    from torch.nn.attention.flex_attention import create_mask

    return create_mask(mask.mask_mod, shape[0], 1, shape[1], mask.seq_lengths[1], device=str(device))
