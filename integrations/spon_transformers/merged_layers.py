# SPDX-License-Identifier: Apache-2.0
"""The sparse layers of a merged checkpoint while transformers loads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safetensors import safe_open
from torch import nn

from spon_plugin.adapter.merged import FIELD, MergedConfig
from spon_plugin.decoder.tokens import follow_tokens, rule_of
from spon_plugin.errors import SponError
from spon_plugin.layers.sparse_linear import SparseLayer, sparse_like
from spon_plugin.weights.linears import linear_features
from spon_transformers.head import round_head
from spon_transformers.quick_blocks import quicken


def paths_in(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Where a model has the layers of a checkpoint, by their paths in it -> as they are stored.

    `AutoModel` makes the backbone alone, without the prefix that its paths have in a model with a head; and the other
    way round. A sparse head is no part of the backbone.

    Raises:
        SponError: the model has no such layer.
    """
    prefix = model.base_model_prefix + "."
    is_backbone = model.base_model is model
    modules = {path for path, _ in model.named_modules()}
    found = {}
    for path in stored:
        candidates = (path, path.removeprefix(prefix), prefix + path)
        here = next((candidate for candidate in candidates if candidate in modules), None)
        if here is not None:
            found[here] = path
        elif path.startswith(prefix) or not is_backbone:
            field = f"{FIELD}: threshold of {path}"
            raise SponError.of(field, "a layer that is missing", f"a layer of {type(model).__name__}")
    return found


def layer_for(merged: MergedConfig, entry: str, linear: nn.Module) -> SparseLayer:
    """The sparse layer in the place of a floating-point `linear`, with room for what the config says of `entry`."""
    layer = sparse_like(linear)
    for name in merged.masks[entry].vectors:
        setattr(layer, name, layer.spon_threshold.new_zeros(linear_features(linear)[0]))
    if merged.has_dense_biases:
        layer.keep_dense_bias()
    return layer


def check_files(merged: MergedConfig, paths: Mapping[str, str], files: Sequence[str]) -> None:
    """See that the weights files have the tensors that the config speaks of; transformers would make them up.

    Args:
        merged: the checkpoint's config.
        paths: of its sparse layers, see `paths_in`.
        files: of the checkpoint; others than safetensors are taken as they are.

    Raises:
        SponError: a tensor is missing.
    """
    safetensors = [file for file in files if str(file).endswith(".safetensors")]
    if not safetensors or len(safetensors) != len(files):
        return
    stored: Counter[str] = Counter()
    for file in safetensors:
        with safe_open(file, framework="pt") as tensors:
            stored.update(_tail(key) for key in tensors.keys() if ".spon_" in key)  # noqa: SIM118 (not a dict)
    for path, entry in paths.items():
        for name in merged.tensors(entry):
            tail = _tail(f"{path}.{name}")
            if stored[tail] == 0:
                raise SponError.of(f"{path}.{name}", "no such tensor", f"one, as {FIELD} has it", "Merge again.")
            stored[tail] -= 1


def _tail(key: str) -> str:
    """A tensor's name from the list of blocks on: what is before has other names in files, and in backbones alone."""
    parts = key.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[max(0, first - 1) :])


def finish_layers(model: Any, paths: Mapping[str, str], merged: MergedConfig) -> None:
    """Give loaded sparse layers their thresholds, and the model its rule of dense tokens.

    Args:
        model: whose sparse layers hold the tensors of the checkpoint.
        paths: of those layers, see `paths_in`.
        merged: the checkpoint's config.

    Raises:
        SponError: a vector is not what it should be.
    """
    for path, entry in paths.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, SparseLayer)
        announced, device = merged.masks[entry], layer.spon_threshold.device
        vectors = {name: getattr(layer, name) for name in announced.vectors}
        layer.spon_threshold = announced.mask(path, linear_features(layer)[0], vectors).threshold.to(device)
        layer.arrange_for_kernels()
    quicken(model)
    round_head(model, merged.head)
    follow(model, merged)


def follow(model: nn.Module, merged: MergedConfig) -> None:
    """Let the model leave dense what the config leaves dense."""
    rule = rule_of(merged.fields, model)
    if rule.leaves_any:
        follow_tokens(model, rule)
