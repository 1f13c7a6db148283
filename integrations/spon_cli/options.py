# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, each described once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from spon_plugin import SponError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a hub name, or a .gguf file or directory.")]
AdapterDir = Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter directory.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="The directory to make; it must not exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Sparsity = Annotated[float, typer.Option(help="Share of the linears' inputs to zero, in [0, 1).")]
_ALLOCATION = "uniform, greedy (TEAL's, within each block), or sensitivity (per channel, with centres; slowest, best)."
Allocation = Annotated[str, typer.Option(help=_ALLOCATION)]
AllocationOrNone = Annotated[str | None, typer.Option(help=_ALLOCATION, show_default="uniform")]
Match = Annotated[
    bool,
    typer.Option(
        "--match", help="Scale thresholds until the sparse model itself meets the target; sensitivity always does."
    ),
]
Text = Annotated[list[Path] | None, typer.Option(help="A text file; may repeat, for an even mix.")]
Dataset = Annotated[
    list[str] | None,
    typer.Option(help="A Hugging Face data set, as NAME:CONFIG@SPLIT (the last two may be left out); may repeat."),
]
Targets = Annotated[
    str | None,
    typer.Option("--target-modules", help="Comma-separated names of the linears to sparsify.", show_default="all"),
]
DensePrefix = Annotated[
    int | None, typer.Option(help="First positions of a sequence that stay dense.", show_default="the format's, 1")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; of the base model's weights.")]
Window = Annotated[int, typer.Option(help="Tokens per window.")]
Seed = Annotated[int, typer.Option(help="Same command, same seed, same adapter.")]


def split_names(value: str | None) -> list[str] | None:
    """``"q_proj, k_proj"`` as a list; None stays None."""
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def split_numbers(field: str, value: str) -> list[float]:
    """``"0.4, 0.5"`` as a list.

    Raises:
        SponError: a part is no number.
    """
    try:
        return [float(part) for part in split_names(value) or []]
    except ValueError:
        raise SponError.of(field, value, "comma-separated numbers, as 0.4,0.5") from None


def check_choice(field: str, value: str, allowed: Sequence[str]) -> None:
    """Raise `SponError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise SponError.of(field, value, "one of " + ", ".join(allowed))
