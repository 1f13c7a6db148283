# SPDX-License-Identifier: Apache-2.0
"""Sparsity measured while a model is evaluated: over the tokens that were scored, padding excluded.

Which tokens of a pass are real is often known only after it (lm-eval pads on the right and passes no attention mask).
So each pass keeps, per site and token, how many entries its mask dropped, and is counted once its caller has said which
of its tokens are real; passes of which nobody says so, such as lm-eval's search for a batch size, do not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spon_lm_eval.layers import SparseModel
from spon_plugin.masking import keep_mask


@dataclass
class Totals:
    """What was counted.

    Attributes:
        masked_tokens: tokens that the masks applied to.
        dense_tokens: real tokens that were left dense: a dense prefix, the context under ``tokens=decode``.
        dropped: per counted layer, entries that its mask dropped.
        seen: per counted layer, entries in the inputs that its mask applied to.
    """

    masked_tokens: int = 0
    dense_tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Totals) -> Totals:
        """The totals of two processes, or of two runs."""
        return Totals(
            self.masked_tokens + other.masked_tokens,
            self.dense_tokens + other.dense_tokens,
            {path: count + other.dropped.get(path, 0) for path, count in self.dropped.items()},
            {path: count + other.seen.get(path, 0) for path, count in self.seen.items()},
        )


@dataclass
class _Pass:
    shape: tuple[int, int]
    dropped: dict[str, Tensor] = field(default_factory=dict)
    masked: Tensor | None = None
    real: Tensor | None = None
    lengths: list[int] = field(default_factory=list)


class InputCounts:
    """Counts what the masks of a `SparseModel` drop, by hooks on it.

    Linears of one site with the same threshold and centre share a mask, so only the first of them is counted.

    Args:
        sparse: the model.
    """

    def __init__(self, sparse: SparseModel) -> None:
        self._sparse = sparse
        self._groups = _groups(sparse)
        self._pass: _Pass | None = None
        self._ended: Tensor | None = None
        self._in_features = {group.counted: sparse.features(group.counted)[0] for group in self._groups}
        self._dropped: dict[str, Tensor] = {}
        self._seen = {group.counted: 0 for group in self._groups}
        self._tokens = [0, 0]
        sparse.inner.register_forward_pre_hook(self._begin, with_kwargs=True)
        for group in self._groups:
            sparse.layers[group.counted].register_forward_pre_hook(self._look(group.counted))

    def scored(self, length: int) -> None:
        """The next row of the last pass begins with `length` real tokens; the rest of it is padding."""
        if self._pass is not None:
            self._pass.lengths.append(length)

    def real(self, real: Tensor) -> None:
        """Which tokens of the last pass are real: bool ``[batch, sequence]``."""
        if self._pass is not None:
            self._pass.real = real

    @contextmanager
    def generation(self, ended: Sequence[int]) -> Iterator[None]:
        """Count every pass in this block.

        A first pass has the padding of its attention mask. In one that continues on a cache, a row whose token is in
        `ended` (end of sequence, padding) is finished and only waits for the others of its batch.
        """
        self._ended = torch.tensor(sorted(set(ended)), dtype=torch.long)
        try:
            yield
        finally:
            self._flush()
            self._ended = None

    def totals(self) -> Totals:
        """Everything counted so far."""
        self._flush()
        dropped = {path: int(self._dropped[path]) if path in self._dropped else 0 for path in self._seen}
        return Totals(self._tokens[0], self._tokens[1], dropped, dict(self._seen))

    def report(self, totals: Totals) -> dict[str, Any]:
        """Sparsity per site and, with the linears weighted by their number of weights, of the model; for JSON.

        None where no token was masked.
        """
        sites: dict[str, list[float]] = {}
        for group in self._groups:
            if totals.seen[group.counted]:
                share = totals.dropped[group.counted] / totals.seen[group.counted]
                sums = sites.setdefault(group.site, [0.0, 0.0])
                sums[0] += share * group.weights
                sums[1] += group.weights
        weights = sum(total for _, total in sites.values())
        return {
            "measured": sum(part for part, _ in sites.values()) / weights if weights else None,
            "masked_tokens": totals.masked_tokens,
            "dense_tokens": totals.dense_tokens,
            "sites": {site: part / total for site, (part, total) in sites.items()},
        }

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._flush()
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            return
        self._pass = _Pass((ids.shape[0], ids.shape[1]))
        if self._ended is not None:
            mask = kwargs.get("attention_mask")
            cache = kwargs.get("past_key_values")
            past = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
            if past:
                self._pass.real = ~torch.isin(ids, self._ended.to(ids.device))
            elif isinstance(mask, Tensor) and mask.shape == ids.shape:
                self._pass.real = mask.bool()
            else:
                self._pass.real = torch.ones_like(ids, dtype=torch.bool)

    def _look(self, path: str) -> Any:
        mask, tokens = self._sparse.masks[path], self._sparse.tokens

        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x, now = args[0], self._pass
            if now is None or x.shape[:-1].numel() != now.shape[0] * now.shape[1]:
                return
            kept = keep_mask(x, mask.threshold, mask.center).sum(-1, dtype=torch.int32)
            now.dropped[path] = (x.shape[-1] - kept).reshape(now.shape)
            if now.masked is None:
                dense = None if tokens is None else tokens.rows(x)
                now.masked = torch.ones_like(kept, dtype=torch.bool) if dense is None else ~dense
                now.masked = now.masked.reshape(now.shape)

        return hook

    def _flush(self) -> None:
        """Count the last pass, if its real tokens are known, and forget it."""
        now, self._pass = self._pass, None
        if now is None or now.masked is None:
            return
        if now.lengths:
            lengths = torch.tensor(now.lengths + [0] * (now.shape[0] - len(now.lengths)), device=now.masked.device)
            now.real = torch.arange(now.shape[1], device=now.masked.device) < lengths.unsqueeze(1)
        if now.real is None:
            return
        counted = now.masked & now.real.to(now.masked.device)
        tokens = int(counted.sum())
        self._tokens[0] += tokens
        self._tokens[1] += int(now.real.sum()) - tokens
        for path, dropped in now.dropped.items():
            total = (dropped * counted.to(dropped.device)).sum()  # int64, and stays on the device
            self._dropped[path] = self._dropped[path] + total if path in self._dropped else total
            self._seen[path] += tokens * self._in_features[path]


@dataclass(frozen=True)
class _Group:
    """Linears under one mask."""

    site: str
    counted: str
    weights: int


def _groups(sparse: SparseModel) -> list[_Group]:
    site_of = {path: site.name for site in sparse.sites for path in site.modules}
    members: dict[tuple[str, bytes], list[str]] = {}
    for path, mask in sparse.masks.items():
        values = b"".join(tensor.cpu().numpy().tobytes() for tensor in mask.without_alpha().tensors().values())
        members.setdefault((site_of.get(path, path), values), []).append(path)
    return [
        _Group(site, paths[0], sum(math.prod(sparse.features(path)) for path in paths))
        for (site, _), paths in members.items()
    ]
