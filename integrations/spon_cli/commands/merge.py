# SPDX-License-Identifier: Apache-2.0
"""`spon merge`: an adapter and its base as one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from spon_cli import options
from spon_cli.adapter_summary import summary
from spon_cli.command import command
from spon_cli.loading import quiet
from spon_cli.output import note, show_json
from spon_cli.progress import progress_bars
from spon_plugin import read_adapter
from spon_plugin.adapter.directory import base_of
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
    trust_remote_code: options.TrustRemoteCode = False


@command
def merge_command(given: MergeOptions) -> None:
    """Fold the alphas into biases and write base and adapter as one checkpoint for transformers.

    It loads with AutoModelForCausalLM.from_pretrained where spon-plugin is installed. Where it is not, transformers
    warns of an unknown quantization method and runs the model dense with the biases in it: do not use it so.

    [dim]spon merge spon50 -o model-spon50[/dim]
    """
    check_new(given.output)
    adapter = read_adapter(given.adapter)
    base = given.model or base_of(adapter.peft, given.adapter)
    from peft import PeftModel

    from spon_transformers.loading import load_model, load_tokenizer

    quiet()
    tokenizer = load_tokenizer(base, given.trust_remote_code)
    model = load_model(base, given.dtype, stored=True, trust_remote_code=given.trust_remote_code)
    adapter.check_base(linear_inputs(model), base)
    with progress_bars() as stage, new_directory(given.output) as directory:
        advance = stage("Merging")
        merged = PeftModel.from_pretrained(model, given.adapter).merge_and_unload()
        advance(1, 2)
        merged.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        advance(2, 2)
    if given.json:
        show_json({"model": str(given.output), "base_model": base, **summary(adapter)})
        return
    note(f"Merged model written to {given.output}")
