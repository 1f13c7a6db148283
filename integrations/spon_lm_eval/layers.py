# SPDX-License-Identifier: Apache-2.0
"""Put an adapter on a loaded model, and say what its layers are and compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from spon_lm_eval.arguments import SponArguments
from spon_plugin.adapter.mask import Mask
from spon_plugin.decoder.sites import Site, find_sites
from spon_plugin.decoder.tokens import DenseTokens
from spon_plugin.errors import SponError
from spon_plugin.layers.sparse_linear import SparseLayer
from spon_plugin.weights.importers.torch_linear import is_offloaded
from spon_plugin.weights.linears import linear_features


@dataclass(frozen=True)
class SparseModel:
    """A model under an adapter.

    Attributes:
        model: what to call: the merged model, or a `PeftModel` around a quantized or offloaded one.
        inner: the transformers model inside it, which every forward pass goes through.
        layers: module path in the base model -> the layer whose input is masked.
        masks: module path -> its mask; alphas are in the biases.
        tokens: which tokens of a pass are dense; None where every token is masked.
        sites: the input sites of the base model; empty if they could not be found.
    """

    model: Any
    inner: nn.Module
    layers: dict[str, Any]
    masks: dict[str, Mask]
    tokens: DenseTokens | None
    sites: list[Site]

    def features(self, path: str) -> tuple[int, int]:
        """``(in_features, out_features)`` of a layer."""
        layer = self.layers[path]
        return (layer.in_features, layer.out_features) if hasattr(layer, "base_layer") else linear_features(layer)


def with_adapter(base: Any, arguments: SponArguments) -> SparseModel:
    """Put the adapter on `base`, with ``W (center + alpha)`` folded into its biases.

    A floating-point model becomes a plain one of `SparseLinear` layers, the very layers of a merged checkpoint. The
    layers of a quantized model, or of one whose weights are offloaded, stay inside PEFT's.

    Args:
        base: a transformers model, changed in place.
        arguments: the adapter, and how to evaluate it.

    Raises:
        SponError: the adapter was made for another base model.
    """
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict

    from spon_peft.adapters import injected_layers

    sites = _sites(base)
    config: Any = PeftConfig.from_pretrained(str(arguments.directory))
    config.tokens, config.dense_prefix = arguments.tokens, arguments.dense_prefix
    if any(is_offloaded(module) for module in base.modules()):
        # `from_pretrained` would dispatch the base once more, by a map of its own.
        model = PeftModel(base, config).eval()
        set_peft_model_state_dict(model, arguments.adapter.tensors())
    else:
        model = PeftModel.from_pretrained(base, arguments.directory, config=config).eval()
    name = model.active_adapter
    layers = injected_layers(model, name)
    if not arguments.alpha:
        config.alpha_modules = []
        for layer in layers.values():
            if name in layer.spon_alpha:
                del layer.spon_alpha[name]
    if any(layer.quantization_backend is not None or is_offloaded(layer.get_base_layer()) for layer in layers.values()):
        model.merge_adapter()
        inner = model.get_base_model()
        masks = {path: layer.mask_of(name).without_alpha() for path, layer in layers.items()}
        tokens = next(iter(layers.values())).spon_tokens.get(name)
        return SparseModel(model, inner, dict(layers), masks, tokens, sites)
    merged: Any = model.merge_and_unload()
    plain = {path: merged.get_submodule(path) for path in layers}
    masks = {path: Mask(layer.spon_threshold, layer.spon_center) for path, layer in plain.items()}
    return SparseModel(merged, merged, plain, masks, next(iter(plain.values())).tokens, sites)


def kernel_of(layer: nn.Module) -> str:
    """The name of what computes a sparsified linear."""
    if isinstance(layer, SparseLayer):
        return layer.kernel
    return "masked dense matmul (torch), quantized weights"


def _sites(base: Any) -> list[Site]:
    try:
        return find_sites(base)
    except SponError:  # linears of another kind than the core knows (GPTQ): each is then a site of its own
        return []
