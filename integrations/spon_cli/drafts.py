# SPDX-License-Identifier: Apache-2.0
"""What `spon eval --drafts` measures for lossless generation, as JSON and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from spon_cli import options
from spon_cli.output import percent, show_table
from spon_plugin import SponError
from spon_plugin.studies.acceptance import Acceptance, StepCosts
from spon_transformers.draft_costs import CONTEXT
from spon_transformers.text_sources import TextSource

_MOST = 15


def draft_numbers(value: str | None, window: int) -> list[int]:
    """What the option ``--drafts`` asks for: ``"1,2,3"`` as a list; none without the option.

    Args:
        value: as the user gave it.
        window: tokens per window.

    Raises:
        SponError: one is no whole number, or the windows are too short for it.
    """
    if value is None:
        return []
    numbers, most = options.split_numbers("drafts", value), min(_MOST, window - CONTEXT - 1)
    if most < 1:
        raise SponError.of("window", window, f"at least {CONTEXT + 2}, with --drafts")
    if not numbers or any(number not in range(1, most + 1) for number in numbers):
        raise SponError.of("drafts", value, f"comma-separated whole numbers from 1 to {most}, as 1,2,3")
    return [int(number) for number in dict.fromkeys(numbers)]


def drafts_record(measured: Acceptance, costs: StepCosts) -> dict[str, Any]:
    """What was measured on a text, for JSON."""
    speedups = {"greedy": costs.speedup(measured.greedy_tokens), "sampled": costs.speedup(measured.sampled_tokens)}
    return {**asdict(measured), "step_seconds": asdict(costs), "speedup": speedups}


def show_drafts(sources: Sequence[TextSource], accepted: Sequence[Acceptance], costs: StepCosts) -> None:
    """Print what is accepted of each text, and a row for each number of drafts."""
    times = [("dense as loaded", costs.plain), ("dense", costs.dense), ("sparse", costs.sparse)]
    times += [(f"dense with {number + 1} tokens", seconds) for number, seconds in costs.verify.items()]
    for source, measured in zip(sources, accepted, strict=True):
        greedy, sampled = costs.speedup(measured.greedy_tokens), costs.speedup(measured.sampled_tokens)
        rows = [
            [
                str(number),
                *(f"{found[number]:.2f}" for found in (measured.greedy_tokens, greedy)),
                *(f"{found[number]:.2f}" for found in (measured.sampled_tokens, sampled)),
            ]
            for number in costs.verify
        ]
        show_table(
            f"Lossless, {source.name}: {percent(measured.greedy)} of drafted tokens accepted greedily, "
            f"{percent(measured.sampled)} sampled",
            ["drafts", "greedy: tokens a round", "speed-up", "sampled: tokens a round", "speed-up"],
            rows,
            caption="ms a step: " + ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in times),
        )
