# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks.decode` measures: a model dense, masked, and with weights of fewer bits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from spon_plugin import Mask
from spon_plugin.decoder.sites import find_sites
from spon_plugin.layers.sparse_linear import SparseLayer, share_calls, sparse_like
from spon_plugin.layers.sparse_quantized import SparseQuantizedLinear
from spon_plugin.masking import keep_mask
from spon_plugin.weights.fold import fold_alpha
from spon_plugin.weights.linears import weight_of
from spon_plugin.weights.scaled import ScaledWeight
from spon_transformers.head import Int8Head, round_head
from spon_transformers.quantize import Rounding, quantize
from spon_transformers.quantized_base import is_quantized
from spon_transformers.quick_blocks import quicken

Step = Callable[[], object]


class Variant(NamedTuple):
    """A model to be timed.

    Attributes:
        name: as tables show it.
        start: reads a prompt ``[1, tokens]`` and gives what decodes a token.
        perplexity: of windows ``[n, length]``.
        bytes_read: of weights, by a decoding step.
        bytes_held: of weights.
    """

    name: str
    start: Callable[[Tensor], Step]
    perplexity: Callable[[Tensor], float]
    bytes_read: float
    bytes_held: int


def variant(name: str, model: Any, ids: Tensor) -> Variant:
    """A transformers model, on a growing cache; what it reads is measured on the tokens of `ids`."""
    read, held = _bytes(model, ids)
    return Variant(name, lambda ids: _step(model, ids), lambda windows: perplexity(model, windows), read, held)


@torch.no_grad()
def _step(model: Any, ids: Tensor) -> Step:
    cache = DynamicCache(config=model.config)
    state = {"token": model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)}

    @torch.no_grad()
    def step() -> None:
        state["token"] = model(state["token"], past_key_values=cache).logits[:, -1:].argmax(-1)

    return step


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """Of all tokens but each window's first."""
    loss, count = 0.0, 0
    for window in windows:
        logits = model(window[None]).logits[0, :-1].float()
        loss += float(nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        count += window.numel() - 1
    return math.exp(loss / count)


@torch.no_grad()
def _bytes(model: Any, ids: Tensor) -> tuple[float, int]:
    """Bytes of weights that a token reads on average, and that the model holds."""
    skipped: dict[str, float] = {}

    def watch(path: str, layer: SparseLayer) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            center = 0 if layer.spon_center is None else layer.spon_center
            skipped[path] = float((~keep_mask(args[0] - center, layer.spon_threshold)).float().mean())

        return layer.register_forward_pre_hook(hook)

    layers = {path: module for path, module in model.named_modules() if isinstance(module, SparseLayer)}
    handles = [watch(path, layer) for path, layer in layers.items()]
    model(ids)
    for handle in handles:
        handle.remove()
    read, held = 0.0, 0
    embeddings = model.get_input_embeddings().weight
    for path, module in model.named_modules():
        rows = module.row_weight if isinstance(module, SparseQuantizedLinear | Int8Head) else None
        if is_quantized(module):  # torchao's
            found = weight_of(module)
            rows = found if isinstance(found, ScaledWeight) else None
        if rows is not None:
            read += rows.in_features * rows.row_bytes * (1 - skipped.get(path, 0)) + _scale_bytes(rows)
            held += rows.in_features * rows.row_bytes + _scale_bytes(rows)
            continue
        for parameter in module.parameters(recurse=False):
            size = parameter.numel() * parameter.element_size()
            shared = module is model.get_output_embeddings() and parameter is embeddings
            held += 0 if shared else size
            read += 0 if parameter is embeddings and not shared else size * (1 - skipped.get(path, 0))
    return read, held


def _scale_bytes(rows: ScaledWeight) -> int:
    parts = (rows.scales, rows.zeros, rows.offsets)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


@torch.no_grad()
def quantile_masks(model: Any, sparsity: float, ids: Tensor) -> dict[str, Mask]:
    """For each linear of `model` a mask at the `sparsity` quantile of its own inputs on `ids`, layers before masked."""
    paths = [path for site in find_sites(model) for path in site.modules]
    thresholds = {path: torch.zeros(1, device=ids.device) for path in paths}

    def watch(path: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            sample = x[:, 1:].abs().float().flatten()
            thresholds[path] = torch.quantile(sample[: 1 << 24], sparsity).reshape(1)
            return (torch.where(x.abs() <= thresholds[path], 0, x),)

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(watch(path)) for path in paths]
    model(ids)
    for handle in handles:
        handle.remove()
    return {path: Mask(threshold) for path, threshold in thresholds.items()}


def folded_biases(model: Any, masks: Mapping[str, Mask]) -> dict[str, Tensor]:
    """Module path -> ``b + W (center + alpha)``, for the linears that have a centre or an alpha."""
    biases = {}
    for path, mask in masks.items():
        linear = model.get_submodule(path)
        if mask.constant is not None:
            folded = fold_alpha(linear, mask.constant, path)
            biases[path] = folded if linear.bias is None else folded + linear.bias.float()
    return biases


def sparse_copy(model: nn.Module, masks: Mapping[str, Mask], biases: Mapping[str, Tensor]) -> nn.Module:
    """`model` with sparse layers under `masks`; embeddings, norms and the head are shared with it."""
    sparse = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for path, mask in masks.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        layer = sparse_like(linear, "meta")
        layer.weight, layer.bias = nn.Parameter(linear.weight.detach(), requires_grad=False), linear.bias
        _fill(layer, mask, biases.get(path), linear.weight.dtype)
        sparse.set_submodule(path, layer)
    share_calls(sparse)
    quicken(sparse)
    return sparse


def with_biases(sparse: nn.Module, biases: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a sparse model that shares all weights with it and has other biases."""
    other = copy.deepcopy(sparse, {id(parameter): parameter for parameter in sparse.parameters()})
    for path, bias in biases.items():
        layer: Any = other.get_submodule(path)
        layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=False)
    return other


@torch.no_grad()
def rounded_copy(model: Any, bits: int, group: int | None) -> Any:
    """`model` with its linears in `bits` bits and its head in eight, on our kernels, nothing masked."""
    rounded = copy.deepcopy(model)
    for path in quantize(rounded, Rounding(bits, group)):
        layer = SparseQuantizedLinear(rounded.get_submodule(path))
        layer.arrange_for_kernels()
        rounded.set_submodule(path, layer)
    share_calls(rounded)
    quicken(rounded)
    round_head(rounded, "int8")
    return rounded.requires_grad_(False)


@torch.no_grad()
def torchao_copy(model: Any) -> Any:
    """`model` with its linears, the head's too, in torchao's int8 by output, on torchao's own products."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    rounded = copy.deepcopy(model)
    quantize_(rounded, Int8WeightOnlyConfig())
    return rounded


def masked(rounded: Any, masks: Mapping[str, Mask], dtype: torch.dtype) -> Any:
    """The sparse model on the weights of a `rounded_copy`, under masks whose constants are folded into biases."""
    shared: list[Any] = [*rounded.parameters(), *rounded.buffers()]
    shared += [layer.row_weight for layer in rounded.modules() if isinstance(layer, SparseQuantizedLinear)]
    sparse = copy.deepcopy(rounded, {id(each): each for each in shared})
    for path, mask in masks.items():
        layer, bias = sparse.get_submodule(path), None
        if mask.constant is not None:
            bias = layer.row_weight.product(mask.constant)
            bias = bias if layer.bias is None else bias + layer.bias.float()
        _fill(layer, mask, bias, dtype)
    return sparse


def _fill(layer: Any, mask: Mask, bias: Tensor | None, dtype: torch.dtype) -> None:
    device = layer.bias.device if layer.bias is not None else mask.threshold.device
    own = mask.to(device)
    layer.spon_threshold, layer.spon_center = own.threshold, own.center
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
    if not isinstance(layer, SparseQuantizedLinear):
        layer.arrange_for_kernels()
