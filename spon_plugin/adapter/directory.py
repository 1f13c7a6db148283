# SPDX-License-Identifier: Apache-2.0
"""The adapter directory: `adapter_config.json` + `adapter_model.safetensors`, strictly read, atomically written.

The one definition of the format. PEFT, vLLM, lm-eval and the command line all come here, so vLLM reads an adapter
without PEFT installed. The files are those of any PEFT adapter; the tensors are

    base_model.model.<module path>.spon_threshold    float32 [1] or, per channel, [in_features]; one for every
                                                     sparsified linear
    base_model.model.<module path>.spon_alpha        float32 [in_features], one for every linear in `alpha_modules`
    base_model.model.<module path>.spon_center       float32 [in_features], for those linears that mask by the distance
                                                     from a centre; none where it is 0

Two fields of the config say which linears have a threshold per channel (`channel_modules`) and which a centre
(`center_modules`), so that PEFT can make layers of the right shape from the config alone. They follow from the tensors;
each is written where there are such linears.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spon_plugin.adapter.adapter import Adapter, masks_of
from spon_plugin.adapter.config import CENTER_MODULES, CHANNEL_MODULES, PEFT_TYPE, SponFields
from spon_plugin.adapter.hub import CONFIG_NAME, WEIGHTS_NAME, adapter_directory, on_hub
from spon_plugin.adapter.saved import saved_tensors
from spon_plugin.errors import SponError
from spon_plugin.files import new_directory

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "is_adapter",
    "is_adapter_name",
    "read_adapter",
    "read_config",
    "save_adapter_files",
    "write_adapter",
]


def is_adapter(path: str | Path) -> bool:
    """Whether `path` is a directory with a SPON adapter's config in it."""
    try:
        config = json.loads((Path(path) / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == PEFT_TYPE


def is_adapter_name(name: str) -> bool:
    """Whether `name` is that of a SPON adapter: a directory, or an id on the hub, which is asked for its config."""
    return is_adapter(name) or (on_hub(name) and is_adapter(adapter_directory(name)))


def read_config(path: str | Path) -> tuple[SponFields, dict[str, Any]]:
    """Read and check `adapter_config.json`.

    Args:
        path: a directory, or an adapter's id on the hub.

    Returns:
        SPON's fields, and every other field as read.

    Raises:
        SponError: the file is missing, is not JSON, is of another PEFT type, or a field is wrong.
    """
    path = adapter_directory(path)
    file = path / CONFIG_NAME
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SponError.of("adapter", str(path), f"a directory with {CONFIG_NAME} in it ({error.strerror})") from error
    except ValueError as error:
        raise SponError.of(str(file), str(error), "valid JSON") from error
    if not isinstance(config, dict) or config.get("peft_type") != PEFT_TYPE:
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise SponError.of(f"{file}: peft_type", kind, repr(PEFT_TYPE), "Is this another kind of adapter?")
    names = [f.name for f in fields(SponFields)]
    for name in ("format_version", "sparsity", "alpha_modules"):
        if name not in config:
            raise SponError.of(f"{file}: {name}", "no such field", "one")
    own = SponFields(**{name: config[name] for name in names if name in config})
    own.check()
    return own, {k: v for k, v in config.items() if k not in names and k != "peft_type"}


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter directory and check everything that can be checked without the base model.

    Args:
        path: a directory, or an adapter's id on the hub.

    Raises:
        SponError: a file is missing, truncated or malformed, a field is wrong, or a tensor is missing, extra, of a
            wrong shape or dtype, not finite, or a negative threshold. The message names it.
    """
    path = adapter_directory(path)
    own, peft = read_config(path)
    file = path / WEIGHTS_NAME
    if not file.is_file():
        raise SponError.of("adapter", str(path), f"a directory with {WEIGHTS_NAME} in it")
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            read = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise SponError.of(
            str(file), str(error), "a whole safetensors file", "It is truncated or damaged; copy or make it again."
        ) from error
    announced = {name: peft.pop(name) for name in (CHANNEL_MODULES, CENTER_MODULES) if name in peft}
    saved = saved_tensors(str(file), read, tuple(peft.get("modules_to_save") or ()))
    adapter = Adapter(own, masks_of(read), peft, saved)
    adapter.check()
    adapter.check_announced(announced)
    return adapter


def write_adapter(adapter: Adapter, path: str | Path, overwrite: bool = False) -> Path:
    """Check `adapter` and write it as a directory, whole or not at all.

    The files are written under a temporary name beside `path` and renamed at the end. The same adapter gives the same
    bytes.

    Args:
        adapter: what to write.
        path: the directory to make.
        overwrite: replace an existing adapter directory.

    Raises:
        SponError: the adapter is not sound, or `path` exists (and `overwrite` is False, or it is not an adapter).
        OSError: the disk is full or not writable; nothing is left at `path`.
    """
    adapter.check()
    with new_directory(path, overwrite=is_adapter(path) if overwrite else False) as directory:
        save_adapter_files(adapter, directory)
    return Path(path)


def save_adapter_files(adapter: Adapter, directory: Path) -> None:
    """Write the two files into an existing `directory`, as they are. Most callers want `write_adapter`."""
    # Copies: the linears of a site may hold one vector among them, and safetensors takes no tensor twice.
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in sorted(adapter.tensors().items())}
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    text = json.dumps(adapter.config(), indent=2, sort_keys=True, default=_plain)
    (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, str):  # str enums
        return str(value.value) if hasattr(value, "value") else str(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")
