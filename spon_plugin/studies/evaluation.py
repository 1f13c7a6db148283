# SPDX-License-Identifier: Apache-2.0
"""Perplexity of the dense model, of the masks alone (TEAL) and of masks with alpha (SPON), under one protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spon_plugin.adapter.directory import Adapter
from spon_plugin.adapter.mask import masks_without_alpha
from spon_plugin.decoder.attachment import sparse_inputs
from spon_plugin.decoder.sites import Site, module_weights
from spon_plugin.decoder.sparsity import SparsityCounter
from spon_plugin.errors import SponError
from spon_plugin.progress import Progress, no_progress

if TYPE_CHECKING:
    from spon_plugin.sparsifiers import Fitted

Protocol = Literal["all-but-first", "last-half"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)


def dense_prefix_of(protocol: str, window: int) -> int:
    """How many first positions of each window a protocol keeps dense.

    ``all-but-first`` masks every position but the first, an attention sink. ``last-half`` is TEAL's evaluation: the
    first half of each window is dense.

    Raises:
        SponError: an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise SponError.of("protocol", protocol, "one of " + ", ".join(PROTOCOLS))
    return 1 if protocol == "all-but-first" else window // 2


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Tensor,
    protocol: str = "all-but-first",
    batch_size: int = 4,
    progress: Progress = no_progress,
) -> float:
    """Perplexity over independent windows.

    All predictions within a window count under ``all-but-first``; under ``last-half`` those that sparse positions
    make. Windows do not overlap and carry no context, so the figure depends on the window: say it with the number.

    Args:
        model: anything that maps ``input_ids=`` to an object with ``logits`` ``[batch, length, vocabulary]``.
        windows: token ids ``[count, length]``.
        protocol: ``all-but-first`` or ``last-half``; says which predictions count, not which positions are masked.
        batch_size: windows per forward pass.
        progress: called after each pass.

    Raises:
        SponError: no window has a prediction.
    """
    if windows.dim() != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise SponError.of("windows", tuple(windows.shape), "at least one window of at least 2 tokens")
    first = 0 if protocol == "all-but-first" else dense_prefix_of(protocol, windows.shape[1])
    if windows.shape[1] < first + 2:
        raise SponError.of("windows", tuple(windows.shape), f"windows of at least {first + 2} tokens for {protocol}")
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(windows), batch_size):
        ids = windows[start : start + batch_size].to(device)
        logits = model(input_ids=ids).logits[:, first:-1]
        for row, target in zip(logits, ids[:, first + 1 :], strict=True):  # row by row: one window's float32 logits
            total += F.cross_entropy(row.float(), target, reduction="sum").item()
        count += ids[:, first + 1 :].numel()
        progress(start + len(ids), len(windows))
    return math.exp(total / count)


@dataclass
class Evaluation:
    """What `evaluate` measured on one text.

    Attributes:
        perplexity: ``dense``, ``teal`` and ``spon``; the last is missing for an adapter without alphas.
        sparsity: ``target``, and ``achieved`` in the sparse model on this text.
        per_module: achieved sparsity of every sparsified linear.
        protocol: ``all-but-first`` or ``last-half``.
        window: tokens per window.
        tokens: tokens in all windows.
    """

    perplexity: dict[str, float]
    sparsity: dict[str, float]
    protocol: str
    window: int
    tokens: int
    per_module: dict[str, float] = field(default_factory=dict)

    @property
    def recovered(self) -> float | None:
        """The share of TEAL's perplexity gap that alpha closes; None without alphas or without a gap."""
        return share_recovered(*(self.perplexity.get(variant) for variant in ("dense", "teal", "spon")))


def share_recovered(dense: float | None, masks: float | None, other: float | None) -> float | None:
    """``(masks - other) / (masks - dense)`` of perplexities; None where one is missing or there is no gap.

    Args:
        dense: of the dense model.
        masks: of what the gap is measured to, such as uniform TEAL.
        other: of what closes some of it.
    """
    if dense is None or masks is None or other is None or masks <= dense:
        return None
    return (masks - other) / (masks - dense)


def evaluate(
    model: nn.Module,
    adapter: Adapter,
    sites: Sequence[Site],
    windows: Tensor,
    protocol: str = "all-but-first",
    batch_size: int = 4,
    progress: Progress = no_progress,
    known: Mapping[str, float] | None = None,
) -> Evaluation:
    """Perplexity of `model` dense, under the adapter's masks (TEAL), and under masks and alphas (SPON).

    Args:
        model: the dense base model.
        adapter: checked against the model first.
        sites: from `find_sites`, for the weights of the model-wide sparsity.
        windows: token ids ``[count, length]``.
        protocol: see `dense_prefix_of`.
        batch_size: windows per forward pass.
        progress: called after each pass, over all three models.
        known: perplexities of these windows that were measured before, by variant; they are not measured again.

    Raises:
        SponError: the adapter does not fit, the protocol is unknown, or the windows are empty.
    """
    prefix = dense_prefix_of(protocol, windows.shape[-1])
    result = Evaluation(
        dict(known or {}), {"target": adapter.fields.sparsity}, protocol, windows.shape[-1], windows.numel()
    )
    possible = ("dense", "teal", "spon") if adapter.has_alpha else ("dense", "teal")
    variants = [variant for variant in possible if variant not in result.perplexity]
    steps = len(variants) * len(windows)
    for index, variant in enumerate(variants):

        def advance(done: int, _total: int, index: int = index) -> None:
            progress(index * len(windows) + done, steps)

        if variant == "dense":
            result.perplexity[variant] = perplexity(model, windows, protocol, batch_size, advance)
            continue
        counter = SparsityCounter()
        masks = adapter.masks if variant == "spon" else masks_without_alpha(adapter.masks)
        with sparse_inputs(model, masks, prefix, counter):
            result.perplexity[variant] = perplexity(model, windows, protocol, batch_size, advance)
        weights = module_weights(sites)
        result.sparsity["achieved"] = counter.overall({path: weights.get(path, 0) for path in adapter.masks})
        result.per_module = counter.per_module()
    return result


def evaluate_fitted(
    model: nn.Module,
    fitted: Fitted | None,
    windows: Tensor,
    protocol: str = "all-but-first",
    progress: Progress = no_progress,
    **added: Any,
) -> dict[str, Any]:
    """Perplexity of `model` under any sparsification method, and how much the method leaves unused on this text.

    Args:
        model: the dense model.
        fitted: the method; None for the dense model.
        windows: token ids ``[count, length]``.
        protocol: see `dense_prefix_of`.
        progress: called after each pass.
        added: ``alphas=`` or ``biases=`` of `Fitted.attach`.

    Returns:
        ``tokens``, ``window``, ``perplexity`` and, under a method, ``masked`` (share of the model's weights that go
        unused) and ``saved`` (the same, less what the method reads besides).

    Raises:
        SponError: the protocol is unknown, or the windows are empty.
    """
    row: dict[str, Any] = {"tokens": int(windows.numel()), "window": int(windows.shape[1])}
    if fitted is None:
        row["perplexity"] = perplexity(model, windows, protocol, progress=progress)
        return row
    prefix = dense_prefix_of(protocol, windows.shape[1])
    counter = SparsityCounter()
    with fitted.attach(model, counter=counter, **added) as tokens:
        if not fitted.static:
            tokens.dense_prefix = prefix
        row["perplexity"] = perplexity(model, windows, protocol, progress=progress)
    row["masked"] = fitted.masked_share(counter)
    row["saved"] = 1 - fitted.read_share(counter)
    return row
