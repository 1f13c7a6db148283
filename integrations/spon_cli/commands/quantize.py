# SPDX-License-Identifier: Apache-2.0
"""`spon quantize`: a model in 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from spon_cli import options
from spon_cli.calibration import CALIBRATION_TOKENS
from spon_cli.command import Between, command
from spon_cli.loading import quiet
from spon_cli.output import note, show_json
from spon_cli.progress import progress_bars
from spon_plugin import SponError, read_adapter
from spon_plugin.adapter.base import base_digest
from spon_plugin.calibration.text import mixed_windows
from spon_plugin.decoder.sites import linear_inputs
from spon_plugin.files import check_new, new_directory
from spon_plugin.weights.error_feedback import RIDGE, check_ridge
from spon_transformers.quantize import (
    Rounding,
    bits_per_weight,
    check_quantizer,
    quantize,
    save_quantized,
    widest_group,
)
from spon_transformers.solver import quantize_for_inputs
from spon_transformers.windows import check_ids, check_length

WINDOW = 512
POOR = 0.5
"""From this sparsity on what is fitted to one text carries over poorly to others: docs/results/frontier.md."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(options.TextOptions, options.SeedOptions):
    """Options of `spon quantize`."""

    model: options.Model
    output: options.Output
    bits: Annotated[int, typer.Option(help="8 or 4.")] = 4
    group: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale; 0 for all.",
            show_default="all for 8 bits; for 4 128, or what divides every linear",
        ),
        Between(0, options.MANY),
    ] = None
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="With zero points: finer where a group is all of one sign.")
    ] = False
    head: Annotated[bool, typer.Option("--head", help="The output head too; a tied one gets weights of its own.")] = (
        False
    )
    adapter: Annotated[
        Path | None, typer.Option(help="With --text: round for the inputs that this adapter's masks leave.")
    ] = None
    tokens: Annotated[
        int | None,
        typer.Option(help="Of the texts to read.", show_default=str(CALIBRATION_TOKENS)),
        Between(1, options.MANY),
    ] = None
    window: Annotated[
        int | None, typer.Option(help="Tokens per window.", show_default=str(WINDOW)), Between(2, options.MANY)
    ] = None
    ridge: Annotated[
        float | None,
        typer.Option(help="How much staying near the given weights counts, with --text.", show_default=str(RIDGE)),
    ] = None
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16, of scales and of what is not rounded; auto is as stored.")
    ] = "auto"
    trust_remote_code: options.TrustRemoteCode = False

    @property
    def reads(self) -> bool:
        """Whether weights are rounded for the inputs that they get on some text.

        Raises:
            SponError: an option that needs a text stands without one.
        """
        if self.text or self.dataset:
            return True
        for name in ("adapter", "tokens", "window", "ridge"):
            if (value := getattr(self, name)) is not None:
                received = str(value) if isinstance(value, Path) else value
                raise SponError.of(name, received, "nothing without --text or --dataset", "Give a text to read.")
        return False


@command
def quantize_command(given: QuantizeOptions) -> None:
    """Round a model's linears to 8 or 4 bits: a checkpoint in the format of compressed-tensors.

    transformers and vLLM run it as it is, without spon-plugin; every command here takes it as its MODEL. With --text
    each linear is rounded such that on that text, after the layers before it, it gives what it gave; with --adapter
    under its masks. That takes minutes for a small model, and is well worth it at four bits.

    [dim]spon quantize ./model --bits 4 --text wiki.txt --text speeches.txt -o model-w4[/dim]

    [dim]spon quantize ./model --bits 4 --group 32 --asymmetric --text wiki.txt --adapter teal40 -o w4-for-teal40[/dim]

    [dim]spon quantize ./model --bits 8 --head -o model-w8[/dim]
    """
    check_quantizer()
    check_new(given.output)
    sources = given.sources() if given.reads else []
    adapter = None if given.adapter is None else read_adapter(given.adapter)
    ridge = check_ridge(RIDGE if given.ridge is None else given.ridge)
    if adapter is not None and adapter.fields.sparsity >= POOR:
        note(
            f"The adapter masks {adapter.fields.sparsity:.0%}: from {POOR:.0%} on weights that are fitted for masks "
            "may serve other text worse than the nearest ones do. Compare both with spon eval --reference."
        )
    fits = given.group is None and given.bits == 4  # the group follows the model
    rounding = Rounding(given.bits, Rounding.group if fits else given.group or None, not given.asymmetric, given.head)
    rounding.check()
    from spon_transformers.loading import load_model, load_tokenizer

    quiet()
    with progress_bars() as stage, new_directory(given.output) as directory:
        stage("Loading the model")
        tokenizer = load_tokenizer(given.model, given.trust_remote_code)
        model = load_model(given.model, given.dtype, stored=True, trust_remote_code=given.trust_remote_code)
        if fits:
            rounding = replace(rounding, group=widest_group(model))
        if sources:
            length, tokens = given.window or WINDOW, given.tokens or CALIBRATION_TOKENS
            check_length(model, length)
            if adapter is not None:
                adapter.check_base(linear_inputs(model), given.model, base_digest(model))
            texts = [source.text for source in sources]
            windows = mixed_windows(tokenizer, texts, length, max(1, tokens // length), given.seed)
            check_ids(model, windows)
            linears = quantize_for_inputs(model, rounding, windows, adapter, ridge, stage("Rounding"))
        else:
            linears = quantize(model, rounding, stage("Rounding"))
        save_quantized(model, directory)
        tokenizer.save_pretrained(directory)
        bits = bits_per_weight(model)
    if given.json:
        shown = {"model": str(given.output), "bits": given.bits, "group": rounding.group, "linears": len(linears)}
        show_json({**shown, "symmetric": rounding.symmetric, "head": rounding.head, "bits_per_weight": bits})
        return
    scales = "a scale for each output" if rounding.group is None else f"groups of {rounding.group}"
    note(f"{len(linears)} linears at {bits:.2f} bits a weight, {scales}, scales included, written to {given.output}")
