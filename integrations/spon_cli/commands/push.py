# SPDX-License-Identifier: Apache-2.0
"""`spon push`: an adapter onto a model hub."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from spon_cli import options
from spon_cli.command import command
from spon_cli.model_card import card_again
from spon_cli.output import note, show_json
from spon_cli.progress import progress_bars
from spon_plugin import SponError, read_adapter
from spon_plugin.adapter.directory import is_adapter, save_adapter_files
from spon_plugin.adapter.hub import CARD_NAME, is_hub_id

_BESIDE = (CARD_NAME, "loss.csv", "loss.png")


@dataclass(frozen=True, kw_only=True)
class PushOptions(options.JsonOptions):
    """Options of `spon push`."""

    adapter: options.AdapterDir
    repository: Annotated[str, typer.Argument(metavar="REPOSITORY", help="On the hub, as name or org/name.")]
    base: Annotated[
        str | None, typer.Option(help="The base model's id on the hub, where the adapter names a directory.")
    ] = None
    private: Annotated[bool, typer.Option("--private", help="Where the repository is made now: for yourself.")] = False


@command
def push_command(given: PushOptions) -> None:
    """Upload an adapter to the Hugging Face hub, with its model card: huggingface_hub, and the checks of our own.

    Log in with `hf auth login`, or set HF_TOKEN. The adapter must name its base model by its id on the hub.

    [dim]spon push spon50 org/my-model-spon50 --base org/my-model[/dim]
    """
    if not is_adapter(given.adapter):
        raise SponError.of("adapter", str(given.adapter), "an adapter directory")
    adapter = read_adapter(given.adapter)
    base = given.base or adapter.base_model or ""
    if not is_hub_id(base):
        raise SponError.of(
            "base", base, "the base model's id on the hub, which others can load", "Add --base org/name."
        )
    adapter = replace(adapter, peft={**adapter.peft, "base_model_name_or_path": base})
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with tempfile.TemporaryDirectory() as temporary, progress_bars() as stage:
        directory = Path(temporary)
        save_adapter_files(adapter, directory)
        for name in _BESIDE:
            if (given.adapter / name).is_file():
                shutil.copy(given.adapter / name, directory)
        card = given.adapter / CARD_NAME
        old = card.read_text(encoding="utf-8") if card.is_file() else ""
        if given.base or not old:
            (directory / CARD_NAME).write_text(card_again(old, adapter), encoding="utf-8")
        stage(f"Uploading to {given.repository}")
        api = HfApi()
        try:
            repository = api.create_repo(given.repository, exist_ok=True, private=given.private or None).repo_id
            commit = api.upload_folder(
                repo_id=repository, folder_path=directory, commit_message=f"SPON adapter {adapter.digest[:12]}"
            )
        except HFValidationError as error:
            raise SponError.of("repository", given.repository, f"a name on the hub ({error})") from error
        except HfHubHTTPError as error:
            raise OSError(f"the hub refused {given.repository}: {str(error).splitlines()[0]}") from error
    if given.json:
        show_json({"repository": repository, "url": str(commit.commit_url), "base_model": base})
        return
    note(f"Uploaded to {repository}: PeftModel.from_pretrained(base, {repository!r}), vllm serve {repository}")
