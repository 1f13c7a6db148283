# SPDX-License-Identifier: Apache-2.0
"""What a merged checkpoint's `quantization_config` says, for every host that reads one.

A threshold stands there as a number, because loading a checkpoint in bfloat16 may round those among its tensors; where
a linear has a threshold per channel it is null, and the tensor `spon_threshold` of that linear counts. The linears in
`center_modules` have a tensor `spon_center`. The biases are the folded ones; the dense model's are held beside them,
for whoever leaves tokens dense. All these tensors are float32, the biases of the dtype of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spon_plugin.adapter.config import CENTER_MODULES, SponFields, check_modules, names_module
from spon_plugin.adapter.mask import CENTER, THRESHOLD, Mask
from spon_plugin.errors import SponError

FIELD = "quantization_config"
"""What errors call the object."""
QUANT_METHOD = "spon"
"""Its `quant_method`, and the name of the quantization method in every host."""
MASK_FIELDS = ("format_version", "sparsity", "tokens", "dense_prefix", "thresholds", CENTER_MODULES)
DIGEST = "adapter_digest"
"""Its other fields."""
BASE_QUANTIZATION = "base_quantization_config"
"""The field with the `quantization_config` of a quantized base, whose tensors the checkpoint has as they were."""
HEAD, HEADS = "head", ("int8",)
"""The field with what the output head is rounded to once it is loaded, and its values; the file has it as it was."""
DENSE_BIAS = "spon_dense_bias"
"""The tensor of a linear's dense bias, of the model's dtype."""


@dataclass(frozen=True)
class Announced:
    """What `quantization_config` says about one linear's mask, whose vectors are among the checkpoint's tensors.

    Attributes:
        threshold: of all inputs; None for one per channel.
        has_center: whether there is a centre.
    """

    threshold: float | None
    has_center: bool = False

    @property
    def vectors(self) -> tuple[str, ...]:
        """The names of the linear's tensors, each float32 ``[in_features]``."""
        return (THRESHOLD,) * (self.threshold is None) + (CENTER,) * self.has_center

    def mask(self, path: str, in_features: int, vectors: Mapping[str, Tensor]) -> Mask:
        """The mask, once the tensors are loaded.

        Args:
            path: of the linear, for the error.
            in_features: of the linear.
            vectors: holds those named in `vectors`.

        Raises:
            SponError: see `check_vector`.
        """
        for name in self.vectors:
            check_vector(path, name, vectors[name], in_features)
        scalar = None if self.threshold is None else torch.tensor([self.threshold], dtype=torch.float32)
        return Mask(vectors[THRESHOLD] if scalar is None else scalar, vectors[CENTER] if self.has_center else None)


def check_vector(path: str, name: str, vector: Tensor, in_features: int) -> None:
    """Check a `spon_threshold` or `spon_center` tensor of a checkpoint, once it is loaded.

    Raises:
        SponError: it is not float32 ``[in_features]``, not finite, or a negative threshold.
    """
    field = f"{path}.{name}"
    if tuple(vector.shape) != (in_features,):
        raise SponError.of(field, tuple(vector.shape), f"shape ({in_features},), the layer's in_features")
    if vector.dtype != torch.float32:
        raise SponError.of(field, vector.dtype, "torch.float32", "A rounded threshold is another mask.")
    if not bool(torch.isfinite(vector).all()) or (name == THRESHOLD and bool((vector < 0).any())):
        expected = "finite values >= 0" if name == THRESHOLD else "finite values"
        raise SponError.of(field, "other values", expected, "The checkpoint is broken; merge again.")


def holds_dense_biases(fields: SponFields) -> bool:
    """Whether the checkpoint has `spon_dense_bias` tensors, for tokens that stay dense or a server's dense steps.

    In format version 1 it is without them where every token is masked.
    """
    return fields.format_version > 1 or fields.dense_prefix > 0 or fields.tokens != "all"


@dataclass(frozen=True)
class MergedConfig:
    """A merged checkpoint's `quantization_config`, read and checked.

    Attributes:
        fields: the adapter's that it keeps; the others have their defaults.
        masks: module path -> what it says about that linear's mask.
        digest: of the adapter that was merged; see `spon_plugin.Adapter`.
        head: what the output head is rounded to, one of `HEADS`; None for the head as it is.
    """

    fields: SponFields
    masks: dict[str, Announced]
    digest: str | None = None
    head: str | None = None

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> MergedConfig:
        """Read the object as JSON has it; without `dense_prefix` every token is masked.

        Raises:
            SponError: a field is missing or wrong, or the format is of another version.
        """
        fields, thresholds = _fields(stored), _thresholds(stored.get("thresholds"))
        centered = _centered(stored.get(CENTER_MODULES), thresholds)
        masks = {path: Announced(value, path in centered) for path, value in thresholds.items()}
        head = stored.get(HEAD)
        if head not in (None, *HEADS):
            raise SponError.of(f"{FIELD}: {HEAD}", head, "one of " + ", ".join(HEADS))
        return cls(fields, masks, stored.get(DIGEST), head)

    @property
    def has_dense_biases(self) -> bool:
        """See `holds_dense_biases`."""
        return holds_dense_biases(self.fields)

    def tensors(self, path: str) -> tuple[str, ...]:
        """The names of the tensors that the linear at `path` has beside its weight and bias."""
        return (*self.masks[path].vectors, *(DENSE_BIAS,) * self.has_dense_biases)


def _fields(stored: Mapping[str, Any]) -> SponFields:
    """The adapter's fields that a merged checkpoint keeps; others have their defaults.

    Args:
        stored: the object as JSON has it. Without `dense_prefix` every token is masked.

    Raises:
        SponError: one of them is wrong, or the format is of another version or of none.
    """
    fields = SponFields(
        sparsity=stored.get("sparsity", SponFields.sparsity),
        tokens=stored.get("tokens", SponFields.tokens),
        dense_prefix=stored.get("dense_prefix", 0),
    )
    fields.format_version = stored.get("format_version")  # type: ignore[assignment]
    fields.check()
    return fields


def _thresholds(thresholds: Any) -> dict[str, float | None]:
    """The thresholds: module path -> number, or None for one per channel.

    Raises:
        SponError: there are none, or one of them is neither null nor a finite number >= 0.
    """
    if not isinstance(thresholds, dict) or not thresholds:
        raise SponError.of(f"{FIELD}: thresholds", thresholds, "module paths with their thresholds")
    for path, value in thresholds.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and (not number or not math.isfinite(value) or value < 0):
            raise SponError.of(f"{FIELD}: threshold of {path}", value, "a finite number >= 0, or null for a vector")
    return dict(thresholds)


def _centered(center_modules: Any, thresholds: Iterable[str]) -> set[str]:
    """Which of the sparse linears have a centre.

    Args:
        center_modules: as `spon_plugin.Adapter.center_modules`; None for none.
        thresholds: paths of the sparse linears.

    Raises:
        SponError: `center_modules` is neither ``"all"`` nor a list of names.
    """
    modules = [] if center_modules is None else center_modules
    check_modules(f"{FIELD}: {CENTER_MODULES}", modules)
    return {path for path in thresholds if names_module(modules, path)}
