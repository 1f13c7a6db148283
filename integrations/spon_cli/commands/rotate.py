# SPDX-License-Identifier: Apache-2.0
"""`spon rotate`: a model that says the same, and loses less under masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from spon_cli import options
from spon_cli.calibration import CALIBRATION_TOKENS, HELD_OUT_WINDOWS, split_held_out
from spon_cli.command import Between, command
from spon_cli.duration import announce
from spon_cli.loading import quiet
from spon_cli.output import note, show_json
from spon_cli.progress import progress_bars
from spon_plugin.calibration.text import mixed_windows
from spon_plugin.files import check_new, new_directory
from spon_plugin.rotation.search import STEPS, check_masked
from spon_transformers.loading import load_model, load_tokenizer
from spon_transformers.rotate import rotate_model
from spon_transformers.windows import check_ids, check_length

APART = 1 / 3
"""Where windows start in their parts of a text: not where those of calibration do, to which the masks would seem to
cost even less, as the basis has been chosen on them."""


@dataclass(frozen=True, kw_only=True)
class RotateOptions(options.TextOptions, options.SeedOptions):
    """Options of `spon rotate`."""

    model: options.Model
    output: options.Output
    sparsity: Annotated[float, typer.Option(help="That masks will have, in (0, 1).")] = 0.5
    tokens: Annotated[int, typer.Option(help="Of the texts to read."), Between(1, options.MANY)] = CALIBRATION_TOKENS
    window: Annotated[int, typer.Option(help="Tokens per window."), Between(2, options.MANY)] = 256
    steps: Annotated[int, typer.Option(help="Of the search."), Between(1, options.MANY)] = STEPS
    trust_remote_code: options.TrustRemoteCode = False


@command
def rotate_command(given: RotateOptions) -> None:
    """Turn a model's residual stream so that masks cost less, and fold that into its weights: nothing to pay later.

    The output is an ordinary checkpoint of the same architecture, equal to the given one but for rounding; what it
    drops under masks matters less. Calibrate, train, quantize, serve it as any other MODEL. A tied output head gets
    weights of its own. For models of Llama's kind.

    [dim]spon rotate ./model --text wiki.txt --text speeches.txt -o rotated[/dim]

    [dim]spon train ./rotated --method sensitivity --sparsity 0.5 --text wiki.txt -o spon50[/dim]
    """
    check_new(given.output)
    check_masked(given.sparsity)
    sources = given.sources()
    announce(f"This reads {given.tokens} tokens forward and backward, and takes {given.steps} steps of a search")
    quiet()
    with progress_bars() as stage, new_directory(given.output) as directory:
        stage("Loading the model")
        tokenizer = load_tokenizer(given.model, given.trust_remote_code)
        model = load_model(given.model, stored=True, trust_remote_code=given.trust_remote_code)
        check_length(model, given.window)
        texts = [source.text for source in sources]
        count = max(1, given.tokens // given.window)
        windows = mixed_windows(tokenizer, texts, given.window, count + HELD_OUT_WINDOWS, given.seed, APART)
        check_ids(model, windows)
        parts = split_held_out(windows, count)
        found = rotate_model(model, *parts, given.sparsity, given.steps, given.seed, stage)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    less = 1 - found.after / found.before
    if given.json:
        shown = {"model": str(given.output), "sparsity": given.sparsity, "sites": found.sites, "steps": given.steps}
        show_json({**shown, "cost_before": found.before, "cost_after": found.after})
        return
    note(f"What masks drop of the {found.sites} inputs on the residual stream costs {less:.0%} less on other windows")
    note(f"Model written to {given.output}; make its adapters anew, with spon calibrate or spon train")
