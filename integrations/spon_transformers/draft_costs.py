# SPDX-License-Identifier: Apache-2.0
"""What the steps of lossless generation cost on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.studies.acceptance import StepCosts
from spon_transformers.lossless import sparse_view

CONTEXT = 64
"""Tokens in the cache of a step."""
_TURNS = 24


class _Step:
    """A step of some tokens that can be run again and again: what it adds to the cache is taken off."""

    def __init__(self, model: Any, ids: Tensor, rows: int) -> None:
        self.model, self.rows, self.times = model, ids[:, CONTEXT : CONTEXT + rows].to(model.device), list[float]()
        self.cache = DynamicCache(config=model.config)
        self.cache.activate_past_recording()
        model(input_ids=ids[:, :CONTEXT].to(model.device), past_key_values=self.cache, logits_to_keep=1)

    def run(self) -> None:
        start = time.perf_counter()
        self.model(input_ids=self.rows, past_key_values=self.cache).logits[0, -1, 0].item()
        self.times.append(time.perf_counter() - start)
        self.cache.crop(-self.rows.shape[1])


def step_costs(model: Any, adapter: Adapter, ids: Tensor, drafts: Sequence[int]) -> StepCosts:
    """Time the steps of a dense model and of its sparse view, by turns; medians.

    Args:
        model: a dense transformers model; `sparse_view` changes it in place.
        adapter: its adapter.
        ids: a text ``[1, tokens]``, `CONTEXT` tokens and one more than the largest of `drafts`, or longer.
        drafts: numbers of tokens that are drafted before the dense model reads them.

    Raises:
        SponError: as `sparse_view`.
    """
    (plain,) = _medians([(model, 1)], ids)
    view = sparse_view(model, adapter)
    dense, sparse, *verify = _medians([(model, 1), (view, 1), *((model, 1 + number) for number in drafts)], ids)
    return StepCosts(plain, dense, sparse, dict(zip(drafts, verify, strict=True)))


@torch.no_grad()
def _medians(steps: Sequence[tuple[Any, int]], ids: Tensor) -> list[float]:
    made = [_Step(model, ids, rows) for model, rows in steps]
    for _ in range(_TURNS):
        for step in made:
            step.run()
    return [statistics.median(step.times[2:]) for step in made]
