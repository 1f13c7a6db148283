# SPDX-License-Identifier: Apache-2.0
"""`spon merge`: an adapter and its base as one checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from spon_cli import options
from spon_cli.adapter_summary import summary
from spon_cli.loading import base_of
from spon_cli.output import note, progress_bars, show_json
from spon_plugin import read_adapter
from spon_plugin.decoder.sites import linear_inputs
from spon_plugin.files import check_new, new_directory


def merge_command(
    adapter: options.AdapterDir,
    output: options.Output,
    base_model: Annotated[
        str | None, typer.Option("--model", help="The base model, if it is no longer where the adapter says.")
    ] = None,
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Fold the alphas into biases and write base and adapter as one checkpoint for transformers.

    It loads with AutoModelForCausalLM.from_pretrained where spon-plugin is installed. Where it is not, transformers
    warns of an unknown quantization method and runs the model dense with the biases in it: do not use it so.

    [dim]spon merge spon50 -o model-spon50[/dim]
    """
    check_new(output)
    loaded = read_adapter(adapter)
    base = base_model or base_of(loaded, str(adapter))
    from peft import PeftModel

    from spon_transformers.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(base)
    model = load_model(base, dtype)
    loaded.check_base(linear_inputs(model), base)
    with progress_bars() as stage, new_directory(output) as directory:
        advance = stage("Merging")
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        advance(1, 2)
        merged.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        advance(2, 2)
    if json:
        show_json({"model": str(output), "base_model": base, **summary(loaded)})
        return
    note(f"Merged model written to {output}")
