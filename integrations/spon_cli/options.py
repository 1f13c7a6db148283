# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, each described once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from spon_cli.command import Between
from spon_cli.loading import Loaded, load
from spon_plugin import SponError
from spon_plugin.adapter.base import weights_digest
from spon_plugin.calibration.text import windows_digest
from spon_plugin.files import check_new, claim
from spon_plugin.sparsifiers.calibrate import METHODS
from spon_plugin.sparsifiers.registry import adapter_methods, adapter_sparsifier
from spon_plugin.studies.evaluation import ALL, LAST_HALF, PROTOCOLS
from spon_plugin.studies.last_word import read_passages
from spon_plugin.training.recipe import Recipe
from spon_transformers.text_sources import TextSource, text_sources


def output_option(help: str) -> Any:
    """The option ``--output``: until the command ends, no other command may write there."""
    return typer.Option("-o", "--output", callback=_claim, help=help)


def _claim(context: typer.Context, value: Path | None) -> Path | None:
    if value is not None:
        context.with_resource(claim(value))
    return value


MANY = 2**31 - 1  # more than any text has tokens

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a hub name, or a .gguf file or directory.")]
AdapterDir = Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter directory, or one's id on the hub.")]
AdapterOption = Annotated[Path, typer.Option(help="The adapter: a directory, or an id on the hub.")]
Output = Annotated[Path, output_option("The directory to make; it must not exist.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Sparsity = Annotated[float, typer.Option(help="Share of the linears' inputs to zero, in [0, 1).")]
Match = Annotated[
    bool,
    typer.Option(
        "--match", help="Scale thresholds until the sparse model itself meets the target; sensitivity always does."
    ),
]
Targets = Annotated[
    str | None,
    typer.Option("--target-modules", help="Comma-separated names of the linears to sparsify.", show_default="all"),
]
DensePrefix = Annotated[
    int | None,
    typer.Option(help="First positions of a sequence that stay dense.", show_default="0"),
    Between(0, MANY),
]
Window = Annotated[int, typer.Option(help="Tokens per window."), Between(2, MANY)]
TestTokens = Annotated[int, typer.Option(help="Tokens of each test text."), Between(1, MANY)]


@dataclass(frozen=True, kw_only=True)
class JsonOptions:
    """How the result is printed."""

    json: Json = False


@dataclass(frozen=True, kw_only=True)
class SeedOptions(JsonOptions):
    """For commands that draw or order something."""

    # What numpy and scikit-learn take.
    seed: Annotated[int, typer.Option(help="Same command, same seed, same adapter."), Between(0, 2**32 - 1)] = 0


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """For commands that take a model."""

    model: Model
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16 or float16; auto is the model's own, and float32 on a CPU that emulates that."
        ),
    ] = "auto"
    trust_remote_code: TrustRemoteCode = False

    def load(
        self, target_modules: Sequence[str] | None = None, precision: str | None = None, base: str | None = None
    ) -> Loaded:
        """Load the model, or the base of what `model` is; see `loading.load`."""
        return load(base or self.model, self.dtype, target_modules, precision, self.trust_remote_code)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """For commands that read text."""

    text: Annotated[list[Path] | None, typer.Option(help="A text file; may repeat, for an even mix.")] = None
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="A Hugging Face data set, as NAME:CONFIG@SPLIT (the last two may be left out); may repeat."),
    ] = None

    def sources(self, part: str = "all") -> list[TextSource]:
        """Read the texts; see `text_sources`."""
        return text_sources(self.text, self.dataset, part)


@dataclass(frozen=True, kw_only=True)
class LastWordOptions:
    """For commands that ask for the last words of passages."""

    lambada: Annotated[
        Path | None,
        typer.Option(help='LAMBADA, JSON lines with a "text" each: how many last words are guessed right, too.'),
    ] = None
    passages: Annotated[int, typer.Option(help="How many of its passages, from the first."), Between(1, MANY)] = 200

    def last_word_texts(self) -> list[str]:
        """Read the passages; see `read_passages`."""
        return [] if self.lambada is None else read_passages(self.lambada, self.passages)

    def last_word_settings(self, texts: Sequence[str]) -> dict[str, Any]:
        """What rows with last words must agree in; see `RowStore`."""
        return {"last_words": sha256("\n".join(texts).encode()).hexdigest() if texts else None}


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """For commands that make an adapter."""

    method: Annotated[
        str | None,
        typer.Option(
            help=", ".join(adapter_methods()) + ", or one that another package brings. teal-greedy shares the target "
            "out within each block; sensitivity sets thresholds and centres per channel: slowest, best; "
            "sensitivity:0.8 goes further by what the output feels than its 0.5.",
            show_default="teal",
        ),
    ] = None
    allocation: Annotated[
        str | None, typer.Option(help="Another way to say teal (uniform), teal-greedy (greedy) or sensitivity.")
    ] = None

    def method_name(self) -> str | None:
        """The method that was asked for; None where the user left it open.

        Raises:
            SponError: there is none of that name, adapters cannot hold it, or the two options disagree.
        """
        if self.allocation is None:
            return None if self.method is None else adapter_sparsifier(self.method).name
        check_choice("allocation", self.allocation, tuple(METHODS))
        meant = METHODS[self.allocation]
        if self.method not in (None, meant):
            raise SponError.of("allocation", self.allocation, f"nothing beside --method {self.method}")
        return meant


@dataclass(frozen=True, kw_only=True)
class StudyOptions(ModelOptions, TextOptions, SeedOptions):
    """For commands that measure rows of tables under one protocol and keep them."""

    output: Annotated[Path, output_option("Where rows and tables are kept; may be resumed.")]
    test: Annotated[list[Path] | None, typer.Option(help="A text to evaluate on; may repeat.")] = None
    calibration_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on."), Between(1, MANY)] = 8192
    window: Window = 512
    max_tokens: TestTokens = 4096
    protocol: Annotated[str, typer.Option(help=f"{ALL} or {LAST_HALF}; as in spon eval.")] = ALL

    def check(self, recipe: Recipe) -> None:
        """Raise `SponError` for what can be told without texts and model."""
        check_choice("protocol", self.protocol, PROTOCOLS)
        if self.calibration_tokens < recipe.window:
            raise SponError.of("calibration_tokens", self.calibration_tokens, f"at least {recipe.window}, one window")
        if not self.output.is_dir():
            check_new(self.output)

    def tests(self) -> list[TextSource]:
        """Read the texts to evaluate on."""
        return text_sources(self.test, None, "test")

    def test_windows(self, loaded: Loaded, tests: Sequence[TextSource]) -> dict[str, Tensor]:
        """The windows of each text to evaluate on, by its name."""
        return {test.name: loaded.leading_windows(test, self.window, self.max_tokens) for test in tests}

    def common(self, loaded: Loaded, tests: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Any]:
        """What all rows of an output must agree in; see `RowStore`."""
        return {
            "model": Path(self.model).name,
            "weights": weights_digest(loaded.model),
            "dtype": loaded.dtype,
            "window": self.window,
            "windows_begin_with": loaded.opening,
            "seed": self.seed,
            "protocol": self.protocol,
            "tests": {name: windows_digest(rows) for name, rows in tests.items()},
            "recipe": recipe.as_dict(),
        }


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
