# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of continuations under ``tokens=decode``: the context dense, the continuation sparse on its cache.

That is what a served model computes. The pass over the context is dense to its last token, whose output predicts the
first token of the continuation; the tokens of the continuation are then read sparsely and predict the ones after them.
All of them go through the model in one pass, which masks them one by one as decoding would. So a continuation of a
single token (MMLU's A to D) costs nothing beyond its context and is scored by the dense model alone.

Cost: requests with the same context (the choices of a question) share one pass over it, and each adds one pass over its
own tokens, in batches. That is fewer tokens than ``tokens=all``, which reads the context again for every choice; but a
batch holds the keys and values of its contexts, and those of each row's own copy, at the same time.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from spon_lm_eval.counts import InputCounts
from spon_plugin.decoder.positions import read_as
from spon_plugin.errors import SponError

Request = tuple[Any, list[int], list[int]]
"""lm-eval's: the strings (None for a rolling window), the tokens of the context, those of the continuation."""


class LanguageModel(Protocol):
    """What is asked of `spon_lm_eval.model.SponHFLM`; all but the last two are `HFLM`'s."""

    max_length: Any
    batch_size: Any
    batch_sizes: Any
    rank: Any
    device: Any
    model: Any
    cache_hook: Any
    softmax_dtype: Any
    mixed_precision_dtype: Any
    inner: Any
    counts: InputCounts

    def _batch_scheduler(self, position: int, requests: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Row:
    """One request.

    Attributes:
        index: its place in the order of requests.
        key: the strings, for lm-eval's cache.
        context: token ids, at least one, cut on the left where the model is too short for them.
        continuation: token ids, at least one.
    """

    index: int
    key: Any
    context: tuple[int, ...]
    continuation: list[int]

    @classmethod
    def of(cls, index: int, request: Request, max_length: int) -> Row:
        """Cut a request as `HFLM` does: the last token is only predicted, so ``max_length + 1`` of them fit.

        Raises:
            SponError: a part is empty, or the continuation alone is too long.
        """
        key, context, continuation = request
        if not context or not 0 < len(continuation) <= max_length:
            expected = f"a context of at least 1 token and a continuation of 1 to {max_length}"
            raise SponError.of("request", f"{len(context)} and {len(continuation)} tokens", expected)
        kept = tuple(context[-(max_length + 1 - len(continuation)) :])
        return cls(index, key, kept, continuation)


def loglikelihoods(
    lm: LanguageModel, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
) -> list[tuple[float, bool]]:
    """What `HFLM._loglikelihood_tokens` returns: log-likelihood and whether greedy decoding gives the continuation.

    Args:
        lm: the model, whose adapter masks passes that continue on a cache.
        requests: in any order.
        disable_tqdm: show no progress.
        override_bs: batch size for a model whose batch size is ``auto``.
    """
    rows = [Row.of(index, request, lm.max_length) for index, request in enumerate(requests)]
    groups = _by_context(rows)
    ordered = [(row.key, list(row.context), row.continuation) for group in groups for row in group]
    auto = lm.batch_size == "auto"
    if auto and not override_bs:
        lm.batch_sizes = {}
    results: list[Any] = [None] * len(rows)
    done = 0
    bar = tqdm(total=len(rows), disable=disable_tqdm or lm.rank != 0, desc="Running loglikelihood requests")
    while groups:
        size = int((override_bs or lm._batch_scheduler(done, ordered)) if auto else lm.batch_size)
        batch = _take(groups, size)
        for row, result in _score(lm, batch, size):
            results[row.index] = result
            if row.key is not None:  # rolling windows are cached as a whole, by loglikelihood_rolling
                lm.cache_hook.add_partial("loglikelihood", row.key, result)
            done += 1
            bar.update(1)
    bar.close()
    return results


def _by_context(rows: Sequence[Row]) -> list[list[Row]]:
    """The requests of each context, longest first: what does not fit into memory fails at once."""
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.context, []).append(row)
    for group in groups.values():
        group.sort(key=lambda row: -len(row.continuation))
    return sorted(
        groups.values(), key=lambda group: (-len(group[0].context) - len(group[0].continuation), group[0].context)
    )


def _take(groups: list[list[Row]], size: int) -> list[list[Row]]:
    """Remove and return the first contexts that have `size` requests between them; one context may have more."""
    batch = [groups.pop(0)]
    while groups and sum(map(len, batch)) + len(groups[0]) <= size:
        batch.append(groups.pop(0))
    return batch


@torch.no_grad()
def _score(lm: LanguageModel, batch: list[list[Row]], size: int) -> list[tuple[Row, tuple[float, bool]]]:
    results = []
    with _autocast(lm):
        first, context, cache = _dense_pass(lm, [group[0].context for group in batch])
        rows = [(place, row) for place, group in enumerate(batch) for row in group]
        for place, row in rows:
            if len(row.continuation) == 1:
                results.append((row, _result(first[place][None], row.continuation)))
        longer = [(place, row) for place, row in rows if len(row.continuation) > 1]
        for start in range(0, len(longer), size):
            chunk = longer[start : start + size]
            # A pass extends its cache in place; another chunk of the same context needs it as it was.
            own = copy.deepcopy(cache) if start + size < len(longer) else cache
            places = torch.tensor([place for place, _ in chunk], device=lm.device)
            own.batch_select_indices(places)
            continuations = [row.continuation for _, row in chunk]
            rest = _sparse_pass(lm, continuations, context.index_select(0, places), own)
            for (place, row), logprobs in zip(chunk, rest, strict=True):
                results.append((row, _result(torch.cat([first[place][None], logprobs]), row.continuation)))
    return results


def _dense_pass(lm: LanguageModel, contexts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, Any]:
    """Read contexts, padded on the left as for generation, so that what follows is contiguous in the cache.

    Returns:
        Log-probabilities of the first token after each context ``[contexts, vocabulary]``, the attention mask
        ``[contexts, longest]``, the cache.
    """
    longest = max(map(len, contexts))
    ids = torch.zeros(len(contexts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, context in enumerate(contexts):
        ids[row, longest - len(context) :] = torch.tensor(context)
        mask[row, longest - len(context) :] = 1
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with read_as(torch.ones_like(mask, dtype=torch.bool)):
        out = _forward(lm, ids, mask, positions, None, last_only=True)
    lm.counts.real(mask.bool())
    if getattr(out, "past_key_values", None) is None:
        raise SponError.of("model_args: tokens", "decode", "a model with a cache of keys and values", "Use tokens=all.")
    return F.log_softmax(out.logits[:, -1], dim=-1, dtype=lm.softmax_dtype), mask, out.past_key_values


def _sparse_pass(lm: LanguageModel, continuations: list[list[int]], context: Tensor, cache: Any) -> list[Tensor]:
    """Read continuations, less their last tokens, on the cache of their contexts.

    Args:
        lm: the model.
        continuations: token ids, at least two each.
        context: attention mask of the contexts ``[rows, longest context]``.
        cache: with a row for each continuation; extended in place.

    Returns:
        Log-probabilities of the second and later tokens, ``[length - 1, vocabulary]`` for each continuation.
    """
    lengths = [len(tokens) - 1 for tokens in continuations]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (tokens, length) in enumerate(zip(continuations, lengths, strict=True)):
        ids[row, :length] = torch.tensor(tokens[:-1])
        mask[row, :length] = 1
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    positions = context.sum(-1, keepdim=True) + torch.arange(ids.shape[1], device=lm.device)
    with read_as(torch.zeros_like(mask, dtype=torch.bool)):
        out = _forward(lm, ids, torch.cat([context, mask], dim=-1), positions, cache)
    lm.counts.real(mask.bool())
    logprobs = F.log_softmax(out.logits, dim=-1, dtype=lm.softmax_dtype)
    return [row[:length] for row, length in zip(logprobs, lengths, strict=True)]


def _forward(
    lm: LanguageModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, last_only: bool = False
) -> Any:
    accepted = inspect.signature(lm.inner.forward).parameters
    optional: dict[str, Any] = {"position_ids": positions}
    if last_only:
        optional["logits_to_keep"] = 1
    optional = {name: value for name, value in optional.items() if name in accepted}
    return lm.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **optional)


def _result(logprobs: Tensor, continuation: list[int]) -> tuple[float, bool]:
    targets = torch.tensor(continuation, device=logprobs.device)
    greedy = bool((logprobs.argmax(dim=-1) == targets).all())
    return float(logprobs.gather(1, targets.unsqueeze(1)).sum()), greedy


def _autocast(lm: LanguageModel) -> AbstractContextManager[Any]:
    dtype = lm.mixed_precision_dtype
    return torch.autocast(device_type=lm.device.type, dtype=dtype, enabled=dtype is not None)
