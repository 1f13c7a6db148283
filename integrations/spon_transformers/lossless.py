# SPDX-License-Identifier: Apache-2.0
"""Lossless generation: a sparse model drafts, its dense model verifies, and both read one copy of the weights.

transformers does the drafting and verifying (`generate(assistant_model=)`): greedy text is the dense model's own, and
samples have its distribution. What it takes is two models, each with a configuration and a key-value cache of its own;
here their linears share every weight, which lies by inputs, as the sparse kernels read it.
"""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.adapter.base import base_digest
from spon_plugin.adapter.directory import read_adapter
from spon_plugin.adapter.hub import adapter_directory
from spon_plugin.adapter.mask import Mask
from spon_plugin.decoder.sites import check_dense, linear_inputs
from spon_plugin.decoder.tokens import DenseTokens, follow_tokens, rule_of
from spon_plugin.errors import SponError
from spon_plugin.layers.row_linear import RowLinear, RowQuantizedLinear
from spon_plugin.layers.sparse_linear import SparseConv1D, SparseLayer
from spon_plugin.layers.sparse_quantized import QuantizedLayer, SparseQuantizedLinear, not_by_rows, sparse_layer
from spon_plugin.weights import Opaque, weight_of
from spon_plugin.weights.dense import DenseWeight
from spon_plugin.weights.fold import fold_alpha
from spon_plugin.weights.linears import is_linear
from spon_plugin.weights.scaled import ScaledWeight
from spon_transformers.quantized_base import pack_again
from spon_transformers.quick_blocks import quicken

DRAFTS = 3
"""Tokens that are drafted before the dense model reads them."""


@torch.no_grad()
def sparse_view(model: Any, adapter: Adapter | str | Path, drafts: int = DRAFTS) -> Any:
    """The sparse model of a dense one, on the dense model's own weights: ``model.generate(assistant_model=view)``.

    `model` is changed in place, and goes on computing what it did: its linears, the output head among them, become
    `RowLinear` or `RowQuantizedLinear`, whose weights lie by inputs. GPT-2's Conv1D lies so already. Other views of the
    same model, by other adapters, share the weights as well. Move or cast the model before, not afterwards.

    Prompts are masked even where the adapter leaves them dense (``tokens: decode``): transformers hands a draft one or
    two tokens at a time, and nothing that a draft leaves out is lost.

    Args:
        model: a dense transformers model in floating point, or quantized in a format with rows and scales.
        adapter: in memory, a directory, or an id on the hub.
        drafts: tokens to draft at a time, at least 1. `spon eval --drafts` measures which number pays.

    Returns:
        A model of the same class: its generation settings ask for `drafts` tokens, whatever the draft's confidence.

    Raises:
        SponError: the model is no dense one of transformers, the adapter was made for another, or a linear that it
            masks has no rows (NF4, offloaded weights).
    """
    if not isinstance(drafts, int) or drafts < 1:
        raise SponError.of("drafts", drafts, "a number of at least 1")
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter_directory(adapter))
    check_view(model, adapter)
    rule = DenseTokens(rule_of(adapter.fields, model).dense_prefix)
    pack_again(model)
    _lay_by_inputs(model)
    view = _on_the_same_weights(model)
    for path, mask in adapter.masks.items():
        view.set_submodule(path, _masked(view.get_submodule(path), mask, path, keeps_dense_bias=rule.leaves_any))
    if rule.leaves_any:
        follow_tokens(view, rule)
    if not any(isinstance(module, QuantizedLayer) for module in view.modules()):
        # Shared calls put a group's codes side by side: views of one model would do so in turns, each for itself.
        quicken(view)
    settings = view.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = drafts, "constant"
    # Nothing stops a draft before its time: the figures of `spon eval --drafts` are for so many tokens.
    settings.assistant_confidence_threshold = 0.0
    return view


def check_view(model: Any, adapter: Adapter) -> None:
    """Raise `SponError` where `sparse_view` would; nothing is changed."""
    _check(model, "one without PEFT around it: merge the other adapter, or unload it")
    check_dense(model)
    adapter.check_masks_alone("a sparse view")
    adapter.check_base(linear_inputs(model), type(model).__name__, base_digest(model))
    DenseTokens(rule_of(adapter.fields, model).dense_prefix).check(model, adapter.masks)
    for path in adapter.masks:
        weight = weight_of(model.get_submodule(path), name=path)
        if not isinstance(weight, DenseWeight | ScaledWeight):
            raise not_by_rows(path, weight, "Load the model in a format with rows, or in floating point.")


@torch.no_grad()
def dense_view(model: Any) -> Any:
    """The dense model of a merged one, on its weights: ``dense_view(merged).generate(assistant_model=merged)``.

    The linears that are dense in both are changed in place, as in `sparse_view`; so may the merged model's settings be
    (`generation_config.num_assistant_tokens`), which say how many tokens it drafts, 20 by transformers' default.

    Args:
        model: a merged transformers model that keeps the dense model's biases, as all but those of format 1 do.

    Returns:
        A model of the same class.

    Raises:
        SponError: the model is no merged one, its dense biases are gone, or it leaves prompts dense.
    """
    _check(model, "a merged one")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, SparseLayer)}
    if not layers:
        raise SponError.of("model", f"a dense {type(model).__name__}", "a merged one", "sparse_view(model, adapter)")
    for path, layer in layers.items():
        if layer.spon_dense_bias is None:
            expected = "the dense model's, which merged checkpoints of format 2 keep"
            raise SponError.of(f"{path}: spon_dense_bias", None, expected, "Merge again.")
        remedy = "Use sparse_view(base, adapter)."
        if isinstance(layer, SparseConv1D):
            raise SponError.of(path, "Conv1D", "torch.nn.Linear or a quantized linear", remedy)
        rule: Any = layer.tokens
        if rule is not None and rule.tokens != "all":
            raise SponError.of("tokens", rule.tokens, "all, as transformers hands a draft two tokens at a time", remedy)
    _lay_by_inputs(model)
    view = _on_the_same_weights(model)
    for path in layers:
        view.set_submodule(path, _unmasked(view.get_submodule(path)))
    if hasattr(view.config, "quantization_config"):
        del view.config.quantization_config
    view.hf_quantizer, view.is_quantized = None, False
    return view


def _check(model: Any, expected: str) -> None:
    if not hasattr(model, "generation_config") or hasattr(model, "peft_config"):
        raise SponError.of("model", type(model).__name__, f"a transformers model that generates, {expected}")


def _lay_by_inputs(model: nn.Module) -> None:
    """Put layers that read rows in the place of all dense linears whose weight has some, on the same tensors."""
    for path, module in list(model.named_modules()):
        ours = isinstance(module, RowLinear | QuantizedLayer | SparseLayer)
        if ours or not is_linear(module):
            continue
        weight = weight_of(module, name=path)
        if isinstance(weight, ScaledWeight):
            model.set_submodule(path, RowQuantizedLinear(module))
        elif isinstance(module, nn.Linear) and not isinstance(weight, Opaque):
            model.set_submodule(path, RowLinear(module))


def _on_the_same_weights(model: Any) -> Any:
    """A copy whose parameters, buffers and rows of codes are the very tensors of `model`."""
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    shared += [module.rows for module in model.modules() if isinstance(module, QuantizedLayer)]
    return copy.deepcopy(model, {id(each): each for each in shared})


def _masked(linear: Any, mask: Mask, path: str, keeps_dense_bias: bool) -> SparseLayer:
    """The sparse layer on the weight of a dense linear, which it takes the place of."""
    layer: SparseLayer
    if isinstance(linear, RowQuantizedLinear):
        layer = SparseQuantizedLinear(linear.host)
        layer.rows = linear.rows
    else:
        layer = sparse_layer(linear, path)
    device = next(chain(linear.parameters(), linear.buffers())).device
    own = mask.to(device)
    layer.spon_threshold, layer.spon_center = own.threshold, own.center
    dense: Tensor | None = linear.bias
    if mask.constant is not None:
        folded = fold_alpha(linear, mask.constant, path)
        folded = folded if dense is None else folded + dense.float()
        dtype = torch.float32 if isinstance(linear, QuantizedLayer) else linear.weight.dtype
        layer.bias = nn.Parameter(folded.to(dtype), requires_grad=False)
    if keeps_dense_bias:
        layer.keep_dense_bias(dense)
    return layer


def _unmasked(layer: SparseLayer) -> nn.Module:
    """The dense layer on the weight of a sparse one, which it takes the place of."""
    bias = layer.spon_dense_bias
    layer.bias = None if bias is None or not bool(bias.any()) else nn.Parameter(bias, requires_grad=False)
    for name in ("spon_threshold", "spon_center", "spon_dense_bias"):
        del layer._buffers[name]
    if not isinstance(layer, SparseQuantizedLinear):
        return RowLinear(layer)
    dense = RowQuantizedLinear(layer.host)
    dense.rows = layer.rows
    return dense
