# SPDX-License-Identifier: Apache-2.0
"""The output head in int8: dense, through the kernels of the sparse layers, as `spon_transformers.head` has it.

A head of its own gives its float weight up. One that is tied shares the embedding's: that stays for looking tokens up,
and the codes lie with it, because it is what a checkpoint loads, the first time and again.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from vllm.config.vllm import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from spon_plugin.kernels import sparse_linear
from spon_plugin.weights.int8 import Int8Weight, round_to_int8
from spon_vllm import ops, rows
from spon_vllm.report import Coverage
from spon_vllm.trained import TrainedEmbeddingMethod

_FLOAT = (UnquantizedEmbeddingMethod, UnquantizedLinearMethod, TrainedEmbeddingMethod)


def method_for(layer: Any, own: Any, coverage: Coverage) -> Any:
    """The method of an embedding or output head where the head is to be in int8.

    Args:
        layer: vLLM's, which is about to make its weights.
        own: the method that it would have; None for vLLM's default.
        coverage: told about a head.

    Returns:
        `own` for other layers, for a head or embedding that is quantized, and where logits are computed in another
        dtype than the model's (``head_dtype``), which is to ask for a head in floating point.
    """
    config = get_current_vllm_config_or_none()
    model = None if config is None else config.model_config
    if model is not None and model.head_dtype != model.dtype:
        return own
    if not isinstance(layer, VocabParallelEmbedding) or not (own is None or type(own) in _FLOAT):
        return own
    own = UnquantizedEmbeddingMethod() if own is None else own
    if isinstance(layer, ParallelLMHead):
        coverage.heads.append(weakref.ref(layer))
        return Int8HeadMethod(own)
    return SharedEmbeddingMethod() if type(own) is UnquantizedEmbeddingMethod else own


class SharedEmbeddingMethod(UnquantizedEmbeddingMethod):
    """An embedding as vLLM has it, with the codes of the output head that is tied to it, if one is."""

    def __init__(self) -> None:
        self.tied = False

    def process_weights_after_loading(self, layer: Any) -> None:
        """Round what was loaded, for the head."""
        super().process_weights_after_loading(layer)
        if self.tied:
            _hold(layer)


class Int8HeadMethod(QuantizeMethodBase):
    """``logits = W x + bias`` on int8 codes with a scale for each token of the vocabulary; every input is read.

    It is no subclass of vLLM's `UnquantizedEmbeddingMethod`, whose weight vLLM takes out of the layer past `apply`.

    Args:
        inner: the method that holds the weight until it is rounded.
    """

    supports_pre_processed_weights = False

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.embedding_layer: Any = None
        self._made: Any = None

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """Make the weight as the checkpoint has it."""
        self.inner.create_weights(layer, *sizes, **attributes)
        self._made = weakref.ref(layer.weight)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Share the embedding's weight, and its codes."""
        layer.weight = embed_tokens.weight
        method = embed_tokens.quant_method
        if isinstance(method, SharedEmbeddingMethod):
            method.tied = True
            self.embedding_layer = weakref.ref(embed_tokens)
        return layer

    @property
    def tied(self) -> bool:
        """Whether the codes lie with an embedding."""
        return self.embedding_layer is not None

    @torch.no_grad()
    def process_weights_after_loading(self, layer: Any) -> None:
        """Round a head of its own and free its float weight."""
        if self.tied:
            return
        if isinstance(self.inner, TrainedEmbeddingMethod):
            self.inner.put(layer)
        _hold(layer)
        rows.release(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map hidden states ``[..., hidden_size]`` to the logits of this rank's tokens, in `x.dtype`."""
        holder = self.embedding_layer() if self.tied else layer
        weight = Int8Weight(holder.spon_codes, holder.spon_scales, group_size=holder.spon_codes.shape[0])
        return sparse_linear(x, weight, ops.nothing(x), bias)


def _hold(layer: Any) -> None:
    """Put the codes and scales of a layer's weight beside it."""
    rows.hold(layer, round_to_int8(layer.weight.data.as_subclass(Tensor)))
