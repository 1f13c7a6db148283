# SPDX-License-Identifier: Apache-2.0
"""What an operator may know about the step that it runs in: which rows are padding, and whether all tokens decode.

Python runs in every eager step, but under CUDA graphs only while one is captured. So what is decided here must hold
for every replay, and what differs between replays must come from tensors that vLLM keeps in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available

_speculates = False
_splits_context = False
_graph_sizes: tuple[int, ...] | None = None
_most_requests = 0
_measured = 1


def configure(vllm_config: Any) -> None:
    """Take from the configuration of this worker's engine what a step does not say about itself.

    It is kept here and not in a layer's arguments: vLLM's compile cache does not tell these settings apart, and would
    keep the ones that a graph was traced with.

    Args:
        vllm_config: vLLM's `VllmConfig`; None, outside an engine, changes nothing.
    """
    global _speculates, _splits_context, _graph_sizes, _most_requests
    if vllm_config is not None:
        _speculates = vllm_config.speculative_config is not None
        parallel = vllm_config.parallel_config
        ways = (parallel.decode_context_parallel_size, getattr(parallel, "prefill_context_parallel_size", 1))
        _splits_context = max(ways) > 1
        compilation = vllm_config.compilation_config
        graphs = compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE)
        _graph_sizes = tuple(compilation.cudagraph_capture_sizes or ()) if graphs else None
        _most_requests = vllm_config.scheduler_config.max_num_seqs


def served_limit(limit: int) -> int:
    """The largest step that a limit in tokens lets run sparse: CUDA graphs serve fewer sizes, and pad to the next.

    Args:
        limit: in tokens.

    Returns:
        The largest size of a graph that is not above `limit`, 0 for none; `limit` itself without CUDA graphs.
    """
    return limit if not _graph_sizes else max((size for size in _graph_sizes if size <= limit), default=0)


def sizes(most: int) -> list[int]:
    """The numbers of tokens that decoding steps of this engine have, padding included, up to `most`."""
    if _graph_sizes:
        return sorted(size for size in _graph_sizes if size <= most) or [1]
    return list(range(1, max(1, min(most, _most_requests or most)) + 1))


def measured() -> int:
    """The limit in tokens that was measured on this worker's layers.

    It is kept here and not in a layer's arguments, where vLLM's compile cache would keep that of another measurement.
    """
    return _measured


def set_measured(limit: int) -> None:
    """Set what `measured` says."""
    global _measured
    _measured = limit


def decodes_only(tokens: int) -> bool:
    """Whether every request has one token in this step, as far as can be known.

    Steps with more are prompts, or speculative decoding that verifies drafts. A piecewise CUDA graph serves all kinds
    of steps, so nothing is known there: they count as decoding, unless the server speculates.

    Args:
        tokens: in the step, padding included.
    """
    context = _context()
    if context is None:
        return True
    mode = context.cudagraph_runtime_mode
    known = None if mode == CUDAGraphMode.PIECEWISE else _one_token_each(_metadata(context))
    if known or (known is False and mode == CUDAGraphMode.NONE):
        return known
    # A whole-step graph is captured for one number of tokens in each request, or for any.
    descriptor = context.batch_descriptor
    if descriptor is not None and descriptor.uniform and descriptor.num_reqs:
        return bool(descriptor.num_reqs == tokens)
    return not _speculates


def padding(tokens: int) -> Tensor | None:
    """Which rows of this step are padding: bool ``[tokens]``; None where there is none, or nobody can tell.

    Args:
        tokens: in the step, padding included.
    """
    context = _context()
    if context is None:
        return None
    if not _in_graph(context) and getattr(_metadata(context), "num_actual_tokens", tokens) == tokens:
        return None
    mask = getattr(context, "is_padding", None)  # vLLM 0.26 and later
    if mask is None and not _splits_context:
        slots = context.slot_mapping  # padding has no slot in the key-value cache; nor has another rank's token
        first = next(iter(slots.values()), None) if isinstance(slots, dict) else None
        mask = None if first is None else first < 0
    return mask if mask is not None and tuple(mask.shape) == (tokens,) else None


def real_tokens(tokens: int) -> Tensor | int | None:
    """How many rows of this step are tokens of requests: a number, or a tensor ``[]`` that replays fill; None: unknown.

    Steps that vLLM makes up, to warm up or to keep other ranks company, have none.

    Args:
        tokens: in the step, padding included.
    """
    context = _context()
    if context is None:
        return tokens
    if not _in_graph(context) and _metadata(context) is None:
        return 0
    mask = padding(tokens)
    if mask is not None:
        return tokens - mask.sum()
    return None if _in_graph(context) else tokens


def _context() -> Any:
    return get_forward_context() if is_forward_context_available() else None


def _in_graph(context: Any) -> bool:
    # vLLM's second model runner captures whole steps in no mode at all.
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return capturing or bool(context.cudagraph_runtime_mode != CUDAGraphMode.NONE)


def _metadata(context: Any) -> Any:
    """That of some attention layer: what is asked of it is the same for all."""
    metadata = context.attn_metadata
    metadata = metadata[0] if isinstance(metadata, list) and metadata else metadata
    return next(iter(metadata.values()), None) if isinstance(metadata, dict) else None


def _one_token_each(metadata: Any) -> bool | None:
    longest = getattr(metadata, "max_query_len", None)
    if longest is not None:
        return bool(longest == 1)
    if hasattr(metadata, "num_prefills") and hasattr(metadata, "num_decode_tokens"):  # FlashInfer, state-space models
        return bool(metadata.num_prefills == 0 and metadata.num_decode_tokens == metadata.num_decodes)
    return None
