# SPDX-License-Identifier: Apache-2.0
"""`Adapter`: one adapter in memory, what its files will say, and whether it makes sense."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from spon_plugin.adapter.config import (
    CENTER_MODULES,
    CHANNEL_MODULES,
    PEFT_TYPE,
    SponFields,
    carries_alpha,
    check_modules,
    names_module,
    short_names,
)
from spon_plugin.adapter.mask import ALPHA, CENTER, KINDS, THRESHOLD, Mask, masks_without_alpha
from spon_plugin.adapter.saved import KEY_PREFIX
from spon_plugin.errors import SponError


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

    def check_base(self, in_features: Mapping[str, int], base: str = "the base model", digest: str = "") -> None:
        """Check that the adapter fits a base model.

        Args:
            in_features: module path -> in_features, of every linear in the model.
            base: the model's name, for the error.
            digest: of its weights (`spon_plugin.adapter.base.base_digest`); empty where it is not known.

        Raises:
            SponError: an alpha, a centre or a vector of thresholds has another length than its layer's input, a layer
                does not exist, or the weights are others than those that the adapter was made for.
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
        known = self.fields.base_digest
        if known and digest and known != digest:
            expected = f"{known[:12]}, that of {self.base_model!r}, which the adapter was made for"
            raise SponError.of("base_digest", f"{digest[:12]}, that of {base}", expected, "Load that model.")


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
