# SPDX-License-Identifier: Apache-2.0
"""A decoder block of Llama's kind as one program for one token on a CPU: norms, attention, and sparse linears between.

It computes what the block's modules compute, rounded where they round. Sums have another order, which moves a last bit,
and a mask turns that into more where an input lies at its threshold.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spon_plugin.kernels.cpu import block
from spon_plugin.kernels.cpu import block_layout as fields
from spon_plugin.kernels.cpu.kernel import Stage
from spon_plugin.kernels.cpu.program import Program
from spon_plugin.layers.shared_calls import Group
from spon_plugin.layers.sparse_linear import SparseLayer
from spon_plugin.layers.watched import WatchedTensors

_exact = attrgetter("exact")
_lock = threading.Lock()  # programs share one scratch, and have their results in places of their own: one at a time
_scratch = torch.empty(0, device="cpu")


@dataclass(frozen=True)
class BlockParts:
    """What a block is made of: ``h = x + out(attention(qkv(norm(x))))``, ``h + down(silu(gate(norm h)) * up(norm h))``.

    Attributes:
        attention_norm: the norm before the attention, with a `weight` ``[hidden_size]``.
        mlp_norm: that before the MLP.
        head_norms: those of every query and of every key ``[head_size]``; None where there are none.
        qkv: three layers.
        out: of the attention.
        gate_up: two layers.
        down: of the MLP.
        eps: of the norms.
        head_size: length of a key.
        scale: of the products of queries and keys.
    """

    attention_norm: nn.Module
    mlp_norm: nn.Module
    head_norms: tuple[nn.Module, nn.Module] | None
    qkv: tuple[Any, Any, Any]
    out: Any
    gate_up: tuple[Any, Any]
    down: Any
    eps: float
    head_size: int
    scale: float

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        """All norms."""
        return (self.attention_norm, self.mlp_norm, *(self.head_norms or ()))

    @property
    def linears(self) -> tuple[Any, ...]:
        """All layers."""
        return (*self.qkv, self.out, *self.gate_up, self.down)


class Cached(NamedTuple):
    """What a block remembers of the tokens before.

    Attributes:
        keys: ``[1, kv_heads, capacity, head_size]``, contiguous.
        values: likewise.
        length: of the tokens; the next one's key and value are written behind theirs.
    """

    keys: Tensor
    values: Tensor
    length: int


def run_blocks(
    programs: Sequence[BlockProgram], x: Tensor, cos: Tensor, sin: Tensor, caches: Sequence[Cached]
) -> list[Tensor] | None:
    """The outputs of blocks that follow each other, for one token; None while another thread of Python runs some.

    Args:
        programs: of the blocks, of one dtype; each `fits`.
        x: ``[1, 1, hidden_size]``, contiguous, of that dtype, like all others.
        cos: as in `block_reference.attend`.
        sin: likewise.
        caches: of the blocks.
    """
    if not _lock.acquire(blocking=False):
        return None
    try:
        lead = programs[0]
        if lead.chain[0] != programs:
            lead.chain = list(programs), Program.joined([each.program for each in programs])
        outputs = list(x.new_empty(len(programs), *x.shape).unbind())
        read = x
        for each, y, cache in zip(programs, outputs, caches, strict=True):
            each.set(read, y, cos, sin, cache)
            read = y
        lead.chain[1].run()
        return outputs
    finally:
        _lock.release()


class BlockProgram:
    """The program of one block, for one dtype of x and one number of threads; made by `of`.

    Attributes:
        dtype: of x, of the norms' weights, and of keys and values.
        head_size: length of a key.
        program: of the block by itself.
        chain: blocks from this one on that were run together, and their program.
    """

    def __init__(self, parts: BlockParts, groups: Sequence[Sequence[Group]], dtype: torch.dtype) -> None:
        self.head_size = parts.head_size
        self.dtype, self._parts, self._groups = dtype, parts, [group for each in groups for group in each]
        self._threads, self._tokens = torch.get_num_threads(), 0
        members = [member for group in self._groups for member in group.members]
        # Of the layers with codes: who holds them, which they were, and how they are multiplied.
        self._rows = [(member.rows, member.part) for member in members if member.rows is not None]
        self._coded = [layer for layer in parts.linears if hasattr(layer, "rows")]
        self._exact = [*map(_exact, self._coded)]
        places = [place for member in members for place in member.places]
        self._tensors = WatchedTensors([*places, *((norm._parameters, "weight") for norm in parts.norms)])
        self._linears_of_block = parts.linears
        self._held: list[Tensor] = []  # what the stages know the addresses of
        self._stages: list[Stage] = []
        hidden, wide = parts.qkv[0].in_features, parts.down.in_features
        rows = [torch.empty(group.in_features, dtype=dtype, device="cpu") for group in self._groups]
        words = [group.scratch_words(row, self._threads) for group, row in zip(self._groups, rows, strict=True)]
        self._memory = self._memory_of_scores = self._scratch(max(*words, block.gate_words(self._threads)))

        # Where x lies is known at each call only.
        x, normed, self._total = (self._new(hidden) for _ in range(3))
        first = self._norm(x, None, parts.attention_norm, normed)
        q, k, v = self._linears(groups[0], normed, [layer.out_features for layer in parts.qkv])
        if parts.head_norms is not None:
            plain_q, plain_k, q, k = q, k, self._new(q.numel()), self._new(k.numel())
            self._norm(plain_q, None, parts.head_norms[0], q)
            self._norm(plain_k, None, parts.head_norms[1], k)
        attended = self._new(q.numel())
        attend = self._add(block.attend(q, k, v, parts.head_size, parts.scale, attended))
        (out,) = self._linears(groups[1], attended, [hidden])
        second = self._norm(x, out, parts.mlp_norm, normed)
        gate, up = self._linears(groups[2], normed, [wide, wide])
        active = self._new(wide)
        self._add(block.gate(gate, up, active, self._memory))
        (delta,) = self._linears(groups[3], active, [hidden])
        last = self._add(block.add(self._total, delta, x))

        self.program = Program(self._stages)
        self.chain: tuple[list[BlockProgram], Program] = [self], self.program
        self._at_y = self.program.place(last, fields.SUM)
        self._at_x = [self.program.place(stage, fields.X) for stage in (first, second)]
        names = (fields.COS, fields.SIN, fields.KEYS, fields.VALUES, fields.CAPACITY, fields.LENGTH, fields.SCRATCH)
        self._at_attend = [self.program.place(attend, name) for name in names]

    @classmethod
    def of(cls, parts: BlockParts, dtype: torch.dtype) -> BlockProgram | None:
        """The program of a block; None where a layer is none of ours, leaves tokens dense, or cannot be watched.

        Args:
            parts: of the block; layers of a group share the storage of their codes from now on.
            dtype: of x.
        """
        if not all(isinstance(layer, SparseLayer) and layer.tokens is None for layer in parts.linears):
            return None
        modules = (*parts.norms, *parts.linears)
        if any(tensor.is_inference() for m in modules for tensor in (*m.parameters(), *m.buffers())):
            return None  # torch counts no writes to these
        weights: list[Any] = [norm.weight for norm in parts.norms]
        if not all(weight.is_cpu and weight.dtype == dtype and weight.is_contiguous() for weight in weights):
            return None
        found = [_groups(layers, dtype) for layers in (parts.qkv, (parts.out,), parts.gate_up, (parts.down,))]
        groups = [group for group in found if group]
        return cls(parts, groups, dtype) if len(groups) == len(found) else None

    def fits(self) -> bool:
        """Whether layers and norms still have the tensors that the program was made of, and torch its threads."""
        if torch.get_num_threads() != self._threads:
            return False
        for layer in self._linears_of_block:
            if layer.tokens is not None:
                return False
        for rows, part in self._rows:
            if rows.weight is not part:
                return False
        return [*map(_exact, self._coded)] == self._exact and self._tensors.are_same()

    def set(self, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, cache: Cached) -> None:
        """Let the next run read x and write y, as `run_blocks` says."""
        words, memory = self.program.words, self._memory_of_scores
        capacity = cache.keys.shape[2]
        if capacity > self._tokens:
            needed = block.attend_words(self._threads, self.head_size, capacity)
            memory, self._tokens = self._scratch(needed), capacity
            self._memory_of_scores = memory
        words[self._at_x[0]] = words[self._at_x[1]] = x.data_ptr()
        words[self._at_y] = y.data_ptr()
        values = (cos.data_ptr(), sin.data_ptr(), cache.keys.data_ptr(), cache.values.data_ptr())
        for place, value in zip(self._at_attend, (*values, capacity, cache.length, memory.data_ptr()), strict=True):
            words[place] = value

    def _new(self, size: int) -> Tensor:
        self._held.append(torch.empty(size, dtype=self.dtype, device="cpu"))
        return self._held[-1]

    @staticmethod
    def _scratch(words: int) -> Tensor:
        global _scratch
        if _scratch.numel() < words:
            _scratch = torch.empty(words, device="cpu")
        return _scratch

    def _add(self, stage: Stage) -> int:
        self._stages.append(stage)
        return len(self._stages) - 1

    def _norm(self, x: Tensor, delta: Tensor | None, norm: nn.Module, out: Tensor) -> int:
        weight: Any = norm.weight
        return self._add(block.norm(x, delta, weight.detach(), self._parts.eps, self._total, out))

    def _linears(self, groups: Sequence[Group], x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The products of layers that read x; their outputs, of `sizes`, lie one behind the other."""
        outputs = list(self._new(sum(sizes)).split(list(sizes)))
        first = 0
        for group in groups:
            read = x
            if group.center is not None:
                read = self._new(x.numel())
                self._add(block.deviate(x, group.center, read))
            count = len(group.members)
            self._add(group.stage(read, outputs[first : first + count], self._memory))
            first += count
        return outputs


def _groups(layers: Sequence[Any], dtype: torch.dtype) -> list[Group] | None:
    """The layers in as few groups as there may be; None where one of them is in none."""
    shared = layers[0].shared
    if shared is None or any(layer.shared is not shared for layer in layers):
        return None
    x = torch.empty(1, layers[0].in_features, dtype=dtype, device="cpu")
    together = shared.group(layers, x)
    found = [shared.group([layer], x) for layer in layers] if together is None else [together]
    groups = [group for group in found if group is not None and group.dtype in (None, dtype)]
    return groups if len(groups) == len(found) else None
