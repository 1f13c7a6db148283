# SPDX-License-Identifier: Apache-2.0
"""Adapters by their names: a directory, or an id on a model hub, whose files are brought into the hub's cache."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from spon_plugin.errors import SponError
from spon_plugin.files import user_path

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"

_SNAPSHOTS = "snapshots"


def is_hub_id(name: str) -> bool:
    """Whether a name can only be that of something on a hub: ``org/name``, and no file of that name."""
    if name.count("/") != 1 or name.startswith((".", "~", "/")) or name.endswith("/"):
        return False
    try:
        return not Path(name).exists()
    except OSError:  # no file can have that name, and no repository either
        return False


def adapter_directory(name: str | Path, field: str = "adapter") -> Path:
    """Where an adapter's files are.

    Args:
        name: a directory, given back as it is, or the id of an adapter on the Hugging Face hub.
        field: what errors call it.

    Raises:
        SponError: the hub cannot be asked, or has no such adapter; or no file can have that name.
    """
    if not is_hub_id(str(name)):
        return user_path(name, field, "an adapter directory")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        expected = "a directory; names on the hub need the package huggingface_hub"
        raise SponError.of(field, str(name), expected) from error
    try:
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, CARD_NAME]))
    except Exception as error:  # its own, those of its client, and of the disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        expected = f"an adapter directory, or the id of one on the hub ({reason})"
        raise SponError.of(field, str(name), expected) from error


def on_hub(name: str) -> bool:
    """Whether a hub has a repository of this id with an adapter's config in it, of whatever kind.

    It asks for that one file, and takes what keeps it from an answer (no network, no such repository) for a no.
    """
    if not is_hub_id(name):
        return False
    try:
        from huggingface_hub import hf_hub_download

        return bool(hf_hub_download(name, CONFIG_NAME))
    except Exception:
        return False


def hub_id_of(directory: str | Path) -> str | None:
    """The id of the repository that a directory of the hub's cache is a snapshot of; None for any other directory."""
    parts = Path(directory).absolute().parts
    for repository, middle in pairwise(parts):
        if middle == _SNAPSHOTS and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/", 1)
    return None
