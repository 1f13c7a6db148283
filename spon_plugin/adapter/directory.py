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

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spon_plugin.adapter.config import (
    CENTER_MODULES,
    CHANNEL_MODULES,
    SponFields,
    carries_alpha,
    check_modules,
    names_module,
    short_names,
)
from spon_plugin.adapter.mask import ALPHA, CENTER, KINDS, THRESHOLD, Mask, masks_without_alpha
from spon_plugin.adapter.saved import KEY_PREFIX, saved_tensors
from spon_plugin.errors import SponError
from spon_plugin.files import new_directory

PEFT_TYPE = "SPON"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


@dataclass
class Adapter:
    """One adapter in memory.

    Attributes:
        fields: SPON's part of the config.
        masks: module path -> what the adapter says about that linear.
        peft: PEFT's part of the config (`base_model_name_or_path`, `target_modules`, ...), kept as read.
        saved: tensors of modules that PEFT saved whole (see `adapter.saved`): key in the file, without its prefix ->
            tensor of any dtype. A host that cannot put them in place must refuse the adapter: `check_masks_alone`.
    """

    fields: SponFields
    masks: dict[str, Mask]
    peft: dict[str, Any] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)

    @property
    def base_model(self) -> str | None:
        """The base model's name or path, as the config has it."""
        return self.peft.get("base_model_name_or_path")

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over what changes the function: every tensor, `tokens` and `dense_prefix`."""
        sha = hashlib.sha256(f"{self.fields.tokens}:{self.fields.dense_prefix}".encode())
        for key, tensor in sorted(self.tensors().items()):
            sha.update(key.encode() + b"\0")
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """The content of the safetensors file: key -> tensor."""
        masks = {
            f"{KEY_PREFIX}{module}.{kind}": tensor
            for module, mask in self.masks.items()
            for kind, tensor in mask.tensors().items()
        }
        return {**masks, **{f"{KEY_PREFIX}{key}": tensor for key, tensor in self.saved.items()}}

    def config(self) -> dict[str, Any]:
        """The content of `adapter_config.json`."""
        vectors = {CHANNEL_MODULES: self.channel_modules, CENTER_MODULES: self.center_modules}
        peft = {name: value for name, value in self.peft.items() if name not in vectors}
        own = {**self.fields.stored(), **{name: value for name, value in vectors.items() if value}}
        return {**peft, **own, "peft_type": PEFT_TYPE}

    @property
    def channel_modules(self) -> str | list[str]:
        """Which linears have a threshold per channel: ``"all"``, or names that fit them alone."""
        return short_names((module for module, mask in self.masks.items() if mask.per_channel), self.masks)

    @property
    def center_modules(self) -> str | list[str]:
        """Which linears have a centre: ``"all"``, or names that fit them alone."""
        return short_names((module for module, mask in self.masks.items() if mask.center is not None), self.masks)

    @property
    def has_alpha(self) -> bool:
        """Whether any linear carries an alpha; without one the adapter is plain TEAL, or WINA or SCAP."""
        return any(mask.alpha is not None for mask in self.masks.values())

    def without_alpha(self) -> Adapter:
        """The same masks without spontaneous activations: the TEAL of this adapter, or its WINA or SCAP."""
        return replace(
            self,
            fields=replace(self.fields, alpha_modules=[]),
            masks=masks_without_alpha(self.masks),
            peft=dict(self.peft),
        )

    def check_masks_alone(self, host: str) -> None:
        """Refuse whole modules where nothing would put them into the model, so that its own would be used, silently.

        Args:
            host: what uses the adapter, for the error.

        Raises:
            SponError: the adapter brings some.
        """
        if self.saved:
            modules = sorted({key.rpartition(".")[0] for key in self.saved})
            remedy = "Load it with PEFT, or merge it with `spon merge`, which put them in place."
            raise SponError.of("modules_to_save", modules, f"none: {host} takes masks and alphas alone", remedy)

    def check(self) -> None:
        """Raise `SponError` if a field is wrong or a tensor is missing, extra, of a wrong shape or dtype, or bad."""
        self.fields.check()
        if not self.masks:
            raise SponError.of("adapter", "no thresholds", "at least one sparsified linear")
        for module, mask in self.masks.items():
            mask.check(module)
            expected = carries_alpha(module, self.fields.alpha_modules)
            if expected != (mask.alpha is not None):
                received, wanted = ("no such tensor", "one") if expected else ("an alpha", "none")
                reason = f"{wanted}, as alpha_modules is {self.fields.alpha_modules!r}"
                raise SponError.of(f"{module}.{ALPHA}", received, reason)

    def check_announced(self, config: Mapping[str, Any]) -> None:
        """Check that a config announces the thresholds per channel and the centres that there are, and no others.

        Args:
            config: holds `channel_modules` and `center_modules`, either of which may be left out.

        Raises:
            SponError: names the tensor.
        """
        for name in (CHANNEL_MODULES, CENTER_MODULES):
            modules = config.get(name, [])
            check_modules(name, modules)
            for module, mask in self.masks.items():
                announced = names_module(modules, module)
                found = mask.center is not None if name == CENTER_MODULES else mask.per_channel
                if found == announced:
                    continue
                kind = CENTER if name == CENTER_MODULES else THRESHOLD
                what = "centre" if name == CENTER_MODULES else "threshold per channel"
                received = f"a {what}" if found else f"no {what}"
                expected = f"{'one' if announced else 'none'}, as {name} is {modules!r}"
                raise SponError.of(f"{module}.{kind}", received, expected)

    def check_base(self, in_features: Mapping[str, int], base: str = "the base model") -> None:
        """Check that the adapter fits a base model.

        Args:
            in_features: module path -> in_features, of every linear in the model.
            base: the model's name, for the error.

        Raises:
            SponError: an alpha, a centre or a vector of thresholds has another length than its layer's input, or a
                layer does not exist.
        """
        remedy = f"The adapter was made for {self.base_model!r}; load that model."
        for module, mask in self.masks.items():
            if module in in_features:
                mask.check_input(module, in_features[module], base, remedy)
        missing = [module for module in self.masks if module not in in_features]
        if missing:
            raise SponError.of(
                "adapter", f"{len(missing)} sparsified layers such as {missing[0]}", f"linears that {base} has", remedy
            )


def masks_of(tensors: Mapping[str, Tensor]) -> dict[str, Mask]:
    """The masks that an adapter's tensors make up.

    Args:
        tensors: keys as in the file, with or without `KEY_PREFIX`; those that are not a mask's are left out.

    Raises:
        SponError: an alpha or a centre belongs to a linear without a threshold.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, kind = key.removeprefix(KEY_PREFIX).rpartition(".")
        if kind in KINDS:
            found.setdefault(module, {})[kind] = tensor
    for module, parts in found.items():
        for kind, name in ((ALPHA, "an alpha"), (CENTER, "a centre")):
            if kind in parts and THRESHOLD not in parts:
                expected = f"{module}.{THRESHOLD} in the same file"
                raise SponError.of(f"{module}.{kind}", f"{name} without a threshold", expected)
    return {m: Mask(parts[THRESHOLD], parts.get(CENTER), parts.get(ALPHA)) for m, parts in found.items()}


def base_of(peft: Mapping[str, Any], adapter: str | Path, remedy: str = "") -> str:
    """The base model that an adapter names.

    Args:
        peft: PEFT's part of its config.
        adapter: its name, for the error.
        remedy: likewise.

    Raises:
        SponError: it names none, or a path that has moved.
    """
    base = peft.get("base_model_name_or_path")
    field = f"{adapter}: base_model_name_or_path"
    if not base:
        raise SponError.of(field, base, "the base model's name or path", remedy)
    if Path(base).expanduser().is_absolute() and not Path(base).expanduser().exists():
        raise SponError.of(field, base, "a directory that exists", remedy)
    return str(base)


def is_adapter(path: str | Path) -> bool:
    """Whether `path` is a directory with a SPON adapter's config in it."""
    try:
        config = json.loads((Path(path) / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == PEFT_TYPE


def read_config(path: str | Path) -> tuple[SponFields, dict[str, Any]]:
    """Read and check `adapter_config.json`.

    Returns:
        SPON's fields, and every other field as read.

    Raises:
        SponError: the file is missing, is not JSON, is of another PEFT type, or a field is wrong.
    """
    file = Path(path) / CONFIG_NAME
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
        path: a local directory.

    Raises:
        SponError: a file is missing, truncated or malformed, a field is wrong, or a tensor is missing, extra, of a
            wrong shape or dtype, not finite, or a negative threshold. The message names it.
    """
    own, peft = read_config(path)
    file = Path(path) / WEIGHTS_NAME
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
