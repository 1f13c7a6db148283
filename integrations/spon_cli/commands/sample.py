# SPDX-License-Identifier: Apache-2.0
"""`spon sample`: text of the model's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from spon_cli import options
from spon_cli.command import Between, command
from spon_cli.duration import announce
from spon_cli.loading import quiet
from spon_cli.output import note, show_json
from spon_cli.progress import progress_bars
from spon_plugin.files import check_new, write_new
from spon_transformers.loading import load_model, load_tokenizer
from spon_transformers.samples import sample_documents
from spon_transformers.windows import check_length


@dataclass(frozen=True, kw_only=True)
class SampleOptions(options.ModelOptions, options.SeedOptions):
    """Options of `spon sample`."""

    output: Annotated[Path, options.output_option("The text file to make; it must not exist.")]
    tokens: Annotated[int, typer.Option(help="To sample, at least."), Between(1, options.MANY)] = 65536
    length: Annotated[int, typer.Option(help="Tokens of each document."), Between(2, options.MANY)] = 256
    batch_size: Annotated[int, typer.Option(help="Documents at a time: hundreds on a GPU."), Between(1, 4096)] = 128


@command
def sample_command(given: SampleOptions) -> None:
    """Write text of the model's own, to calibrate, rotate and train on beside other text, or where there is none.

    Each document goes on from one token of the vocabulary, drawn at random, at temperature 1. It is of all kinds that
    the model knows, so that what is chosen on it carries over to more of them.

    [dim]spon sample ./model -o sampled.txt[/dim]

    [dim]spon rotate ./model --text wiki.txt --text sampled.txt -o rotated[/dim]
    """
    check_new(given.output)
    announce(f"This samples {given.tokens} tokens, {given.batch_size} documents of {given.length} at a time")
    quiet()
    with progress_bars() as stage:
        stage("Loading the model")
        tokenizer = load_tokenizer(given.model, given.trust_remote_code)
        model = load_model(given.model, given.dtype, trust_remote_code=given.trust_remote_code)
        check_length(model, given.length, "length")
        documents = sample_documents(
            model, tokenizer, given.tokens, given.length, given.batch_size, given.seed, stage("Sampling")
        )
    write_new(given.output, "\n\n".join(documents))
    if given.json:
        shown = {"output": str(given.output), "documents": len(documents), "tokens": len(documents) * given.length}
        show_json({**shown, "seed": given.seed})
        return
    note(f"{len(documents)} documents of {given.length} tokens written to {given.output}")
