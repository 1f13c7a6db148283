# SPDX-License-Identifier: Apache-2.0
"""`spon merge`: an adapter and its base as one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from spon_cli import options
from spon_cli.adapter_summary import show_kernels, summary
from spon_cli.command import command
from spon_cli.loading import quiet
from spon_cli.model_card import merged_card
from spon_cli.output import note, show_json
from spon_cli.progress import progress_bars
from spon_plugin import read_adapter
from spon_plugin.adapter.base import base_digest, base_of
from spon_plugin.adapter.hub import CARD_NAME, adapter_directory
from spon_plugin.decoder.sites import linear_inputs
from spon_plugin.files import check_new, new_directory


@dataclass(frozen=True, kw_only=True)
class MergeOptions(options.JsonOptions):
    """Options of `spon merge`."""

    adapter: options.AdapterDir
    output: options.Output
    model: Annotated[str | None, typer.Option(help="The base model, if it is no longer where the adapter says.")] = None
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16, of the merged weights; auto is the base model's own.")
    ] = "auto"
    decode: Annotated[
        bool, typer.Option("--decode", help="Write the values of a .gguf base in --dtype instead of its blocks.")
    ] = False
    head: Annotated[
        str | None,
        typer.Option(
            help="int8: round the output head once it is loaded, in transformers; none: leave it.",
            show_default="int8 where the base is quantized",
        ),
    ] = None
    trust_remote_code: options.TrustRemoteCode = False


@command
def merge_command(given: MergeOptions) -> None:
    """Fold the alphas into biases and write base and adapter as one checkpoint for transformers.

    A quantized base stays quantized, and so does a .gguf file, whose blocks go into the checkpoint.

    It loads with AutoModelForCausalLM.from_pretrained where spon-plugin is installed. Where it is not, transformers
    warns of an unknown quantization method and runs the model dense with the biases in it: do not use it so.

    [dim]spon merge spon50 -o model-spon50[/dim]
    """
    check_new(given.output)
    directory = adapter_directory(given.adapter)
    adapter = read_adapter(directory)
    base = given.model or base_of(adapter.peft, given.adapter)
    from peft import PeftModel

    from spon_plugin.layers.kernel_report import kernel_rows
    from spon_transformers.loading import load_model, load_tokenizer, model_source
    from spon_transformers.quick_blocks import programs

    quiet()
    tokenizer = load_tokenizer(base, given.trust_remote_code)
    blocks = not given.decode
    model = load_model(base, given.dtype, stored=True, trust_remote_code=given.trust_remote_code, blocks=blocks)
    adapter.check_base(linear_inputs(model), base, base_digest(model))
    if blocks and model_source(base).gguf_file is not None:
        kept = sum(type(model.get_submodule(path)).__name__ == "GgufBlockLinear" for path in adapter.masks)
        others = f"; {len(adapter.masks) - kept} run on decoded values" if kept < len(adapter.masks) else ""
        note(f"{kept} masked linears keep the blocks of {base}{others}")
    with progress_bars() as stage, new_directory(given.output) as made:
        advance = stage("Merging")
        merged = PeftModel.from_pretrained(model, directory).merge_and_unload()
        _ask_for_head(merged, given.head)
        advance(1, 2)
        merged.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / CARD_NAME).write_text(merged_card(adapter, base), encoding="utf-8")
        advance(2, 2)
    quick, blocks_of_a_kind = programs(merged)
    kernels = kernel_rows({path: merged.get_submodule(path) for path in adapter.masks}, merged.dtype)
    if given.json:
        shown = {"model": str(given.output), "base_model": base, **summary(adapter)}
        show_json({**shown, "blocks_as_programs": quick, "kernels": [row._asdict() for row in kernels]})
        return
    show_kernels(kernels)
    of = f"{quick} of {blocks_of_a_kind}" if blocks_of_a_kind else "no"
    note(f"A single token on a CPU: {of} blocks run as one program in transformers")
    note(f"Merged model written to {given.output}")


def _ask_for_head(merged: Any, head: str | None) -> None:
    from spon_transformers.head import ask_for_head, can_round

    if head is None:  # the base is quantized, but for a head that can be rounded
        quantized = merged.config.quantization_config.base_quantization_config is not None
        head = "int8" if quantized and can_round(merged.get_output_embeddings()) else "none"
    ask_for_head(merged, None if head == "none" else head)
    if head != "none":
        weight = merged.get_output_embeddings().weight
        tied = weight is merged.get_input_embeddings().weight
        beside = "beside the embeddings" if tied else f"instead of {weight.nbytes / 1e6:.1f} MB"
        note(f"transformers will run the output head in {head}: {weight.numel() / 1e6:.1f} MB, {beside}")
