# SPDX-License-Identifier: Apache-2.0
"""A layer of transformers' growing cache with room behind its tokens, so that one more does not copy all before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 256  # tokens that a layer gets room for beyond those that it holds, at least


class GrowingLayer(DynamicLayer):
    """`DynamicLayer`, whose keys and values are the beginnings of longer tensors.

    Only tensors of its own have room behind them: what is put into `keys` and `values` by cropping, reordering or from
    outside has none, and is copied to a place of its own before a token is added. So is what a copy of a layer holds.

    Attributes:
        keys: ``[sequences, kv_heads, tokens, head_size]``.
        values: likewise.
        all_keys: ``[sequences, kv_heads, capacity, head_size]``, or None.
        all_values: likewise.
        length: tokens of `keys`.
        length_of_values: tokens of `values`.
    """

    all_keys: Any = None
    all_values: Any = None
    length: int = 0
    length_of_values: int = 0

    @classmethod
    def of(cls, layer: DynamicLayer) -> GrowingLayer:
        """A layer that holds what `layer` does."""
        grown = cls()
        grown.dtype, grown.device, grown.is_initialized = layer.dtype, layer.device, layer.is_initialized
        grown.keys, grown.values = layer.keys, layer.values
        return grown

    @property
    def keys(self) -> Any:  # type: ignore[override]
        """Of the tokens held."""
        return _beginning(self.all_keys, self.length)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self.all_keys, self.length = keys, _tokens(keys)

    @property
    def values(self) -> Any:  # type: ignore[override]
        """Of the tokens held."""
        return _beginning(self.all_values, self.length_of_values)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self.all_values, self.length_of_values = values, _tokens(values)

    def with_room(self, tokens: int = 1) -> tuple[Tensor, Tensor]:
        """`all_keys` and `all_values`, contiguous, which may be written for so many tokens behind those held."""
        if min(self.all_keys.shape[2], self.all_values.shape[2]) - self.length < tokens:
            capacity = self.length + tokens + max(_ROOM, self.length // 4)
            self.all_keys = _longer(self.all_keys, self.length, capacity)
            self.all_values = _longer(self.all_values, self.length, capacity)
        return self.all_keys, self.all_values

    def add(self, tokens: int = 1) -> None:
        """Hold so many more, which have been written."""
        self.length += tokens
        self.length_of_values += tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `DynamicLayer.update`."""
        # A gradient has to see the tensors that it flows through, and torch lets nobody write to inference's.
        writes = self.length and not torch.is_grad_enabled() and not (
            self.all_keys.is_inference() and not torch.is_inference_mode_enabled()
        )  # fmt: skip
        if not writes:
            return super().update(key_states, value_states, *args, **kwargs)
        begin, end = self.length, self.length + key_states.shape[2]
        keys, values = self.with_room(end - begin)
        keys[:, :, begin:end], values[:, :, begin:end] = key_states, value_states
        self.add(end - begin)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """As `DynamicLayer.get_seq_length`."""
        return self.length

    def __copy__(self) -> GrowingLayer:
        other = GrowingLayer.__new__(GrowingLayer)
        other.__dict__.update(self.__dict__)
        other.keys, other.values = self.keys, self.values  # without room: two layers would write to the same place
        return other


def _tokens(tensor: Tensor | None) -> int:
    return 0 if tensor is None or not tensor.numel() else tensor.shape[-2]


def _beginning(tensor: Tensor | None, length: int) -> Tensor | None:
    return tensor if tensor is None or _tokens(tensor) == length else tensor[:, :, :length]


def _longer(tensor: Tensor, length: int, capacity: int) -> Tensor:
    sequences, heads, _, size = tensor.shape
    longer = tensor.new_empty(sequences, heads, capacity, size)
    longer[:, :, :length] = tensor[:, :, :length]
    return longer


def growing_layer(cache: Any, index: int, like: Tensor) -> GrowingLayer | None:
    """The layer of a cache, if it holds tokens of one sequence in tensors like another; None for any other.

    A plain layer is replaced in the cache.
    """
    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) is DynamicLayer and layer.is_initialized:
        layer = cache.layers[index] = GrowingLayer.of(layer)
    if type(layer) is not GrowingLayer or not layer.length == layer.length_of_values > 0:
        return None
    keys, values = layer.all_keys, layer.all_values
    if keys.shape[0] != 1 or keys.shape[1::2] != values.shape[1::2]:
        return None
    return layer if keys.is_cpu and values.is_cpu and keys.dtype == values.dtype == like.dtype else None
