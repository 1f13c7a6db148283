# SPDX-License-Identifier: Apache-2.0
"""Between PEFT's adapters, which are spread over layers, and the core's `Adapter`: checking and collecting."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from spon_peft.layer import SponLayer
from spon_plugin.adapter.adapter import Adapter, masks_of
from spon_plugin.adapter.config import CENTER_MODULES, CHANNEL_MODULES, PEFT_TYPE, SponFields
from spon_plugin.adapter.directory import WEIGHTS_NAME, read_adapter, read_config
from spon_plugin.adapter.saved import KEY_PREFIX
from spon_plugin.errors import SponError

if TYPE_CHECKING:
    from spon_peft.config import SponConfig


def check_directory(config: SponConfig, path: str | os.PathLike[str], subfolder: str | None = None) -> None:
    """Check a local adapter directory, and note in `config` what its tensors need of a model.

    Nothing is checked where `path` is not a local directory (a hub id; `check_tensors` sees the tensors later), and
    only the config where no safetensors file lies beside it (a config that was saved on its own).

    Raises:
        SponError: as `spon_plugin.read_adapter`.
    """
    directory = Path(path, subfolder or "")
    if not directory.is_dir():
        return
    if not (directory / WEIGHTS_NAME).is_file():
        read_config(directory)
        return
    adapter = read_adapter(directory)
    shapes = {module: mask.to("meta") for module, mask in adapter.masks.items()}
    config.__dict__["_read_from"] = Adapter(adapter.fields, shapes, adapter.peft)


def check_injected(config: SponConfig, model: nn.Module, adapter_name: str) -> None:
    """Check that the layers injected into `model` are those of the directory that `config` was read from, if any.

    Raises:
        SponError: a vector has another length than its layer's input, or the two name different layers.
    """
    adapter = config.__dict__.get("_read_from")
    if adapter is not None:
        _check_layers(adapter, model, adapter_name)


def check_tensors(config: SponConfig, tensors: Mapping[str, Tensor], model: nn.Module, adapter_name: str) -> None:
    """Check an adapter's state dict, about to be loaded into `model`.

    Args:
        config: the adapter's config.
        tensors: keys as in the file; those that are not ours (`modules_to_save`) are left to PEFT.
        model: with the adapter's layers injected.
        adapter_name: the adapter's name in the model.

    Raises:
        SponError: a tensor is missing, extra, of a wrong shape or dtype, not finite, or a negative threshold.
    """
    adapter = Adapter(_fields(config), masks_of(tensors), _peft_fields(config))
    adapter.check()
    adapter.check_announced({name: getattr(config, name) for name in (CHANNEL_MODULES, CENTER_MODULES)})
    _check_layers(adapter, model, adapter_name)


def collect_adapter(model: nn.Module, adapter_name: str = "default") -> Adapter:
    """The adapter that a model holds, as the core knows it.

    Args:
        model: a `PeftModel`, or a model with injected layers.
        adapter_name: which of its adapters.

    Returns:
        With copies of the tensors on the CPU, in float32; those of `modules_to_save` in their own dtype. Embeddings
        that were resized are not among them: PEFT's `save_pretrained` finds these.

    Raises:
        SponError: the model has no such SPON adapter.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    layers = injected_layers(model, adapter_name)
    if config is None or config.peft_type != PEFT_TYPE or not layers:
        raise SponError.of("adapter_name", adapter_name, "the name of a SPON adapter in the model")
    masks = {
        path: layer.mask_of(adapter_name).map(lambda tensor: tensor.detach().to("cpu", torch.float32, copy=True))
        for path, layer in layers.items()
    }
    return Adapter(_fields(config), masks, _peft_fields(config), _trained_modules(model, adapter_name))


def _trained_modules(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Copies of the tensors of `modules_to_save`, by their keys in the file without its prefix."""
    return {
        f"{path.removeprefix(KEY_PREFIX)}.{name}": tensor.detach().cpu().clone()
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        for name, tensor in module.modules_to_save[adapter_name].state_dict().items()
    }


def injected_layers(model: nn.Module, adapter_name: str) -> dict[str, SponLayer]:
    """Module path in the base model -> layer, for the layers that carry the adapter."""
    return {
        path.removeprefix(KEY_PREFIX): module
        for path, module in model.named_modules()
        if isinstance(module, SponLayer) and adapter_name in module.spon_threshold
    }


def _check_layers(adapter: Adapter, model: nn.Module, adapter_name: str) -> None:
    layers = injected_layers(model, adapter_name)
    base = getattr(model, "name_or_path", "") or "this model"
    adapter.check_base({path: layer.in_features for path, layer in layers.items()}, base)
    extra = [path for path in layers if path not in adapter.masks]
    if extra:
        raise SponError.of(
            "target_modules",
            f"{len(extra)} layers such as {extra[0]} in {base}",
            f"the {len(adapter.masks)} layers that the adapter has tensors for",
            f"The adapter was made for {adapter.base_model!r}; load that model.",
        )


def _fields(config: SponConfig) -> SponFields:
    return SponFields(**{f.name: getattr(config, f.name) for f in fields(SponFields)})


def _peft_fields(config: SponConfig) -> dict[str, object]:
    own = {f.name for f in fields(SponFields)} | {"peft_type"}
    return {key: value for key, value in config.to_dict().items() if key not in own}
