# SPDX-License-Identifier: Apache-2.0
"""Perplexity of the dense model, of the masks alone (TEAL) and of masks with alpha (SPON), under one protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.decoder.attachment import SparseMethod
from spon_plugin.decoder.masked_linears import MaskedLinears
from spon_plugin.decoder.sparsity import SparsityCounter
from spon_plugin.errors import SponError
from spon_plugin.progress import Progress, no_progress
from spon_plugin.studies.last_word import LastWords, Passage, last_words
from spon_plugin.studies.quality import Change, Quality, Reference, changes, score

ALL, LAST_HALF, ALL_BUT_FIRST = "all", "last-half", "all-but-first"
PROTOCOLS = (ALL, LAST_HALF, ALL_BUT_FIRST)


def dense_prefix_of(protocol: str, window: int, own: int = 0) -> int:
    """How many first positions of each window stay dense.

    Args:
        protocol: ``all``: those that the method or adapter leaves dense itself, none by default. ``last-half`` is
            TEAL's evaluation: the first half of each window. ``all-but-first``: one, whatever the adapter says.
        window: tokens per window.
        own: first positions that the method or adapter leaves dense.

    Raises:
        SponError: an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise SponError.of("protocol", protocol, "one of " + ", ".join(PROTOCOLS))
    return {ALL: own, LAST_HALF: window // 2, ALL_BUT_FIRST: 1}[protocol]


def perplexity(
    model: nn.Module,
    windows: Tensor,
    protocol: str = ALL,
    batch_size: int = 4,
    progress: Progress = no_progress,
) -> float:
    """Perplexity over independent windows: `quality`'s, for whoever wants nothing else."""
    return quality(model, windows, protocol, batch_size, progress).perplexity


def quality(
    model: nn.Module,
    windows: Tensor,
    protocol: str = ALL,
    batch_size: int = 4,
    progress: Progress = no_progress,
    reference: Reference | None = None,
) -> Quality:
    """Perplexity over independent windows, and how far the predictions are from a reference's.

    All predictions within a window count; under ``last-half`` those that sparse positions make. Windows do not overlap
    and carry no context, so the figures depend on the window: say it with the number.

    Args:
        model: anything that maps ``input_ids=`` to an object with ``logits`` ``[batch, length, vocabulary]``.
        windows: token ids ``[count, length]``.
        protocol: one of `PROTOCOLS`; says which predictions count, not which positions are masked.
        batch_size: windows per forward pass.
        progress: called after each pass.
        reference: to compare with, made on the same windows.

    Raises:
        SponError: no window has a prediction.
    """
    if windows.dim() != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise SponError.of("windows", tuple(windows.shape), "at least one window of at least 2 tokens")
    first = dense_prefix_of(protocol, windows.shape[1]) if protocol == LAST_HALF else 0
    if windows.shape[1] < first + 2:
        raise SponError.of("windows", tuple(windows.shape), f"windows of at least {first + 2} tokens for {protocol}")
    return score(model, windows, first, batch_size, progress, reference).quality()


@dataclass(frozen=True)
class Measurement:
    """What `evaluate` measured on one text.

    Attributes:
        quality: perplexity, and what was compared with a reference.
        window: tokens per window.
        tokens: tokens in all windows.
        masked: the share of the model's weights that go unused; None for the dense model.
        saved: the same, less what the method reads besides; likewise.
        per_module: achieved sparsity of every sparsified linear.
    """

    quality: Quality
    window: int
    tokens: int
    masked: float | None = None
    saved: float | None = None
    per_module: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Over the windows."""
        return self.quality.perplexity

    def figures(self) -> dict[str, Any]:
        """For a study's row; without `masked` and `saved` where there are none."""
        row = {"tokens": self.tokens, "window": self.window, **self.quality.figures()}
        return row if self.masked is None else {**row, "masked": self.masked, "saved": self.saved}


@dataclass
class Evaluation:
    """What `evaluate_variants` measured on one text.

    Attributes:
        perplexity: ``dense``, ``teal`` and ``spon``; the last is missing for an adapter without alphas.
        quality: all figures of those that were measured here, compared with the dense model or another reference.
        last_words: of the same, where `evaluate_last_words` has put them in.
        sparsity: ``target``, and ``achieved`` in the sparse model on this text.
        per_module: achieved sparsity of every sparsified linear.
        protocol: one of `PROTOCOLS`.
        window: tokens per window.
        tokens: tokens in all windows.
    """

    perplexity: dict[str, float]
    sparsity: dict[str, float]
    protocol: str
    window: int
    tokens: int
    per_module: dict[str, float] = field(default_factory=dict)
    quality: dict[str, Quality] = field(default_factory=dict)
    last_words: dict[str, LastWords] = field(default_factory=dict)

    def changes(self) -> dict[str, Change]:
        """What alpha changes of the masks' figures; empty without alphas."""
        if not {"teal", "spon"} <= self.quality.keys():
            return {}
        return changes(self.quality["teal"].windows, self.quality["spon"].windows)

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
    method: SparseMethod | None,
    windows: Tensor,
    protocol: str = ALL,
    batch_size: int = 4,
    progress: Progress = no_progress,
    reference: Reference | None = None,
    **added: Any,
) -> Measurement:
    """Perplexity of `model` run sparsely, how far it is from a reference, and how much goes unused on this text.

    Args:
        model: the dense model.
        method: any sparsification method, or an adapter as `MaskedLinears.of` it; None for the dense model.
        windows: token ids ``[count, length]``.
        protocol: see `dense_prefix_of`. A static method masks every position under any.
        batch_size: windows per forward pass.
        progress: called after each pass.
        reference: to compare with, made on the same windows.
        added: ``alphas=`` or ``biases=`` of `SparseMethod.attach`.

    Raises:
        SponError: the protocol is unknown, or the windows are empty.
    """
    prefix = dense_prefix_of(protocol, windows.shape[-1], 0 if method is None else method.dense_prefix)
    size = int(windows.shape[-1]), int(windows.numel())
    if method is None:
        return Measurement(quality(model, windows, protocol, batch_size, progress, reference), *size)
    counter = SparsityCounter()
    with method.attach(model, counter=counter, dense_prefix=None if method.static else prefix, **added):
        measured = quality(model, windows, protocol, batch_size, progress, reference)
    masked, saved = method.masked_share(counter), 1 - method.read_share(counter)
    return Measurement(measured, *size, masked, saved, counter.per_module())


def evaluate_variants(
    model: nn.Module,
    adapter: Adapter,
    windows: Tensor,
    protocol: str = ALL,
    batch_size: int = 4,
    progress: Progress = no_progress,
    known: Mapping[str, float] | None = None,
    reference: Reference | None = None,
) -> Evaluation:
    """`evaluate` of `model` dense, under the adapter's masks (TEAL), and under masks and alphas (SPON).

    Args:
        model: the dense base model.
        adapter: checked against the model.
        windows: token ids ``[count, length]``.
        protocol: see `dense_prefix_of`.
        batch_size: windows per forward pass.
        progress: called after each pass, over all three models.
        known: perplexities of these windows that were measured before, by variant; they are not measured again.
        reference: what to compare with, made on these windows, such as the model before it was quantized; by default
            the dense model.

    Raises:
        SponError: the adapter does not fit or brings whole modules, the protocol is unknown, or the windows are empty.
    """
    adapter.check_masks_alone("an evaluation by hooks")
    method = MaskedLinears.of(model, adapter.masks, adapter.fields.dense_prefix)
    result = Evaluation(
        dict(known or {}), {"target": adapter.fields.sparsity}, protocol, windows.shape[-1], windows.numel()
    )
    possible = ("dense", "teal", "spon") if adapter.has_alpha else ("dense", "teal")
    variants = [variant for variant in possible if variant not in result.perplexity]
    before = len(windows) if reference is None else 0
    steps = before + len(variants) * len(windows)
    if reference is None:
        reference = Reference(model, windows, batch_size, lambda done, _total: progress(done, steps))
    for index, variant in enumerate(variants):

        def advance(done: int, _total: int, index: int = index) -> None:
            progress(before + index * len(windows) + done, steps)

        tried, alphas = None if variant == "dense" else method, method.alphas if variant == "spon" else None
        added = {} if tried is None else {"alphas": alphas}
        measured = evaluate(model, tried, windows, protocol, batch_size, advance, reference, **added)
        result.perplexity[variant], result.quality[variant] = measured.quality.perplexity, measured.quality
        if measured.masked is not None:
            result.sparsity["achieved"], result.per_module = measured.masked, measured.per_module
    return result


def evaluate_last_words(
    model: nn.Module,
    adapter: Adapter,
    passages: Sequence[Passage],
    batch_size: int = 8,
    stage: Callable[[str], Progress] = lambda _name: no_progress,
) -> dict[str, LastWords]:
    """Guess the last words of passages with `model` dense, under an adapter's masks, and under masks and alphas.

    Args:
        model: the dense base model.
        adapter: checked against the model; it brings no whole modules.
        passages: from `last_word.encode`.
        batch_size: passages per forward pass.
        stage: gives the progress callback of each model.

    Returns:
        As `Evaluation.last_words`.
    """
    method = MaskedLinears.of(model, adapter.masks, adapter.fields.dense_prefix)
    found = {"dense": last_words(model, passages, batch_size, stage("dense: last words"))}
    for variant, alphas in (("teal", None), ("spon", method.alphas if adapter.has_alpha else None)):
        if variant == "teal" or alphas:
            with method.attach(model, alphas):
                found[variant] = last_words(model, passages, batch_size, stage(f"{variant}: last words"))
    return found
