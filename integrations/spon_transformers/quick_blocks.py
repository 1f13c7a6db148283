# SPDX-License-Identifier: Apache-2.0
"""Decoder blocks of Llama's kind that decode on a CPU without the cost of small operators.

A block of transformers runs some forty operators between its linears, each of which takes microseconds to call; on
models of some hundred million weights that is most of a token. A merged model's block therefore computes a single token
as one program (`layers.block_program`), on a cache that is written where it lies. Whatever is not exactly that case
runs as transformers wrote it: several tokens or sequences, another cache, a mask, gradients, hooks, `torch.compile`.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from spon_plugin.kernels.arguments import is_plain
from spon_plugin.kernels.cpu.kernel import is_available
from spon_plugin.layers.block_program import BlockParts, BlockProgram, Cached, run_blocks
from spon_plugin.layers.sparse_linear import share_calls
from spon_plugin.layers.watched import Watched
from spon_plugin.machine import DTYPES
from spon_transformers.growing_cache import GrowingLayer, growing_layer

KINDS = {
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}DecoderLayer"
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
}
"""Blocks whose forward is Llama's: qualified names, as importing the classes would import the models."""
_SILU = ("SiLU", "SiLUActivation")
_IGNORED = {"position_ids", "use_cache", "cache_position"}  # by a block that has no mask

# Of each thread of Python: `last`, what the last block of a run gave, and whose it was; `ready`, by blocks' programs
# what they will be asked next, and the answers.
_local = threading.local()


class QuickBlock(nn.Module):
    """What the decoder blocks of a model become; see `quicken`.

    Attributes:
        kind: the class of transformers.
        known: the block's program.
    """

    kind: type[nn.Module]
    known: KnownProgram

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as an object of the original's class, which is made one of ours once more."""
        return _new, (self.kind,), self.__dict__


def quicken(model: nn.Module) -> None:
    """Let sparse layers that read one tensor share a call, and blocks of Llama's kind be programs on a CPU, in place.

    Args:
        model: whose blocks are of transformers' own classes, or they are left as they are.
    """
    share_calls(model)
    if not is_available():
        return
    for module in model.modules():
        kind: Any = type(module)
        if f"{kind.__module__}.{kind.__qualname__}" in KINDS and not isinstance(module, QuickBlock):
            module.__class__ = _quick(kind)
            object.__setattr__(module, "known", KnownProgram())


@torch.no_grad()
def programs(model: Any) -> tuple[int, int]:
    """How many blocks compute a single token on a CPU as a program, and how many of Llama's kind there are."""
    blocks = [module for module in model.modules() if isinstance(module, QuickBlock)]
    return sum(block.known.program(block, model.dtype) is not None for block in blocks), len(blocks)


@functools.cache
def _quick(kind: Any) -> type[QuickBlock]:
    """The class of a quick block, under the name that device maps and error messages know the original by."""

    @functools.wraps(kind.forward)
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not torch.compiler.is_compiling() and hidden_states.shape[:-1] == (1, 1):
            y = _step(self, hidden_states, **kwargs)
            if y is not None:
                return y
        return kind.forward(self, hidden_states, *args, **kwargs)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (QuickBlock, kind), {**names, "kind": kind, "forward": forward})


def _new(kind: type) -> Any:
    quick = _quick(kind)
    return quick.__new__(quick)


class KnownProgram:
    """The program of a block, made at the first token; copies and pickles of a block make their own.

    Attributes:
        following: the block that was called with this one's output.
    """

    def __init__(self) -> None:
        self._program: BlockProgram | None = None
        self._dtype: torch.dtype | None = None
        self._modules = Watched([])
        self._hooks: list[dict[Any, Any]] = []
        self._own: list[dict[str, Any]] = []
        self.following: weakref.ref[Any] | None = None

    def __reduce__(self) -> tuple[type[KnownProgram], tuple[()]]:
        return KnownProgram, ()

    def program(self, block: Any, dtype: torch.dtype) -> BlockProgram | None:
        """The program of a block as it is; None where there is none, or where somebody has to see its modules run."""
        if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
            return None
        if not self._is_of(dtype):
            self._learn(block, dtype)
        if any(self._hooks) and not all(_is_idle(hook) for hooks in self._hooks for hook in hooks.values()):
            return None
        for own in self._own:
            if "forward" in own:  # accelerate and others put one of their own there
                return None
        return self._program

    def _is_of(self, dtype: torch.dtype) -> bool:
        if self._dtype != dtype or not self._modules.are_same():
            return False
        return self._program is None or self._program.fits()

    def _learn(self, block: Any, dtype: torch.dtype) -> None:
        attention, mlp = block.self_attn, block.mlp
        inner = [module for module in block.modules() if module is not block]
        self._dtype, self._own = dtype, [module.__dict__ for module in inner]
        self._modules = Watched([(m._modules, name) for m in (block, attention, mlp) for name in m._modules])
        self._hooks = [hooks for module in inner for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        silu = type(mlp.act_fn).__name__ in _SILU
        self._program = BlockProgram.of(_parts(block), dtype) if silu else None


def _is_idle(hook: Any) -> bool:
    """Whether a hook is one that transformers leaves behind once outputs were recorded, and records nothing now."""
    name = getattr(hook, "__module__", None)
    if name != "transformers.utils.output_capturing":
        return False
    collector = getattr(sys.modules.get(name), "_active_collector", None)
    return collector is not None and not collector.get()


def _parts(block: Any) -> BlockParts:
    attention, mlp = block.self_attn, block.mlp
    has_head_norms = hasattr(attention, "q_norm")
    return BlockParts(
        attention_norm=block.input_layernorm,
        mlp_norm=block.post_attention_layernorm,
        head_norms=(attention.q_norm, attention.k_norm) if has_head_norms else None,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        out=attention.o_proj,
        gate_up=(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj,
        eps=block.input_layernorm.variance_epsilon,
        head_size=attention.head_dim,
        scale=attention.scaling,
    )


class _Ready(NamedTuple):
    """What a block will have for an answer when it is called, as it was computed with those before it.

    Attributes:
        x: what it is called with.
        version: of x.
        cos: likewise.
        layer: of the cache.
        cached: what that held, and where.
        y: the answer.
    """

    x: Tensor
    version: int
    cos: Tensor
    layer: GrowingLayer
    cached: Cached
    y: Tensor

    def answers(self, x: Tensor, cos: Tensor, layer: GrowingLayer) -> bool:
        """Whether `y` is the answer to such arguments."""
        if self.x is not x or self.cos is not cos or self.layer is not layer:
            return False
        keys, values, length = self.cached
        same = layer.all_keys is keys and layer.all_values is values and layer.length == length
        return same and _version(x) == self.version


def _step(
    block: Any,
    x: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **others: Any,
) -> Tensor | None:
    """The output of a block for one token; None where the block is to compute it by itself.

    Args:
        block: to compute; with it those that followed it at the token before, whose answers are then ready.
        x: ``[1, 1, hidden_size]``.
        attention_mask: see `forward` of the block, like the rest.
        past_key_values: likewise.
        position_embeddings: likewise.
        others: likewise.
    """
    if attention_mask is not None or position_embeddings is None or not x.is_cpu:
        return None
    if torch.is_grad_enabled() or block.training:  # which may drop some of the attention
        return None
    if not is_plain(x, x, None) or torch.is_autocast_enabled("cpu") or x.dtype not in DTYPES.values():
        return None
    for name, value in others.items():
        if value is not None and name not in _IGNORED:
            return None
    cos, sin = position_embeddings
    known: KnownProgram = block.known
    cache = growing_layer(past_key_values, block.self_attn.layer_idx, x)
    if cache is None:
        return None
    ready = getattr(_local, "ready", {}).pop(known, None)
    if ready is not None and ready.answers(x, cos, cache):
        cache.add()
        return ready.y
    if not (x.is_contiguous() and cos.is_contiguous() and sin.is_contiguous() and cos.dtype == sin.dtype == x.dtype):
        return None
    if block.self_attn.config._attn_implementation != "sdpa":
        return None

    last = getattr(_local, "last", None)
    if last is not None and last[0] is x:
        follows = last[1]()
        if follows is not None:
            follows.following = weakref.ref(block)
    y = _run(block, x, cos, sin, past_key_values)
    if y is not None:
        cache.add()
    return y


def _run(block: Any, x: Tensor, cos: Tensor, sin: Tensor, cache: Any) -> Tensor | None:
    """A block's output, as in `_step`; the answers of those that followed it before are ready then."""
    programs, layers, caches, knowns = [], [], [], []
    indices: set[int] = set()
    following: Any = block
    while following is not None:
        index, known = following.self_attn.layer_idx, following.known
        layer, program = growing_layer(cache, index, x), known.program(following, x.dtype)
        if program is None or layer is None or index in indices:
            break
        indices.add(index)
        keys, values = layer.with_room()
        if not cos.numel() == sin.numel() == keys.shape[3] == program.head_size:
            break
        programs.append(program)
        layers.append(layer)
        caches.append(Cached(keys, values, layer.length))
        knowns.append(known)
        following = None if known.following is None else known.following()
    outputs = run_blocks(programs, x, cos, sin, caches) if programs else None
    if outputs is None:
        return None
    read, ready = [x, *outputs], {}
    for known, layer, cached, x, y in zip(knowns, layers, caches, read, outputs, strict=False):
        ready[known] = _Ready(x, _version(x), cos, layer, cached, y)
    del ready[knowns[0]]
    _local.ready, _local.last = ready, (outputs[-1], weakref.ref(knowns[-1]))
    return outputs[0]


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
