# SPDX-License-Identifier: Apache-2.0
"""One product for the quantized layers of a decoder that read the same tensor: q, k and v; gate and up.

Decoding, a layer's call costs some tens of microseconds before it reads a byte, and narrow outputs are read at a part
of the speed of wide ones. Layers that are called one after the other with the very same tensor, and mask it in the same
way, are therefore multiplied in one go, on codes that lie side by side; the first one that is called does it for all.
Their arguments are checked once, and the kernel is called past the dispatcher, also for a layer that is by itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from spon_plugin.kernels.arguments import is_plain
from spon_plugin.kernels.cpu import known_calls
from spon_plugin.kernels.cpu.scaled import Prepared
from spon_plugin.kernels.few_rows import CPU_ROWS
from spon_plugin.kernels.table import Problem, choose
from spon_plugin.masking import deviation
from spon_plugin.weights.scaled import ScaledWeight


class Layer(Protocol):
    """What is asked of a layer: `sparse_quantized.SparseQuantizedLinear`."""

    in_features: int
    out_features: int
    exact: bool
    bias: Any
    spon_threshold: Tensor
    spon_center: Tensor | None
    rows: Any
    _parameters: dict[str, Any]
    _buffers: dict[str, Any]

    @property
    def row_weight(self) -> ScaledWeight:
        """The weight as the kernels read it."""


class SharedCalls:
    """Calls the CPU kernel for the layers of one module, and finds out by itself which of them read the same tensor.

    An output is handed to the layer it belongs to, once, and only for the very tensor that it was made of, if neither
    that nor the layer's own tensors have been written to since. Copies and pickles of a model find out anew.
    """

    def __init__(self) -> None:
        self._groups: dict[int, _Group | None] = {}  # by the identity of their first layer; None where it is no use
        self._run: _Run | None = None
        self._held: _Held | None = None

    def __reduce__(self) -> tuple[type[SharedCalls], tuple[()]]:
        return SharedCalls, ()

    def __call__(self, layer: Layer, x: Tensor) -> Tensor | None:
        """The output of `layer` for `x`; None where the layer is to compute it by itself.

        Args:
            layer: no token of which is dense.
            x: ``[..., in_features]``.
        """
        if not x.is_cpu or x.shape[-1:] != (layer.in_features,) or x.is_inference():
            return None
        if not 0 < x.numel() <= CPU_ROWS * layer.in_features or torch.is_autocast_enabled("cpu"):
            return None
        held, key = self._held, id(layer)
        if held is not None and held.x is x and held.version == x._version:
            found = held.outputs.pop(key, None)
            if not held.outputs:
                self._held = None
            if found is not None and found[0].fits():
                return found[1]
        group = self._groups.get(key)
        if group is None:
            if key not in self._groups and is_plain(x, x, None):
                self._learn(layer, x)
            return None
        if group.members[0].layer() is not layer or not all(member.fits() for member in group.members):
            del self._groups[key]
            return None
        if not is_plain(x, group.weight.codes, None):
            return None
        parts = group(x)
        if len(parts) > 1:
            pairs = zip(group.members[1:], parts[1:], strict=True)
            self._held = _Held(x, x._version, {member.key: (member, part) for member, part in pairs})
        return parts[0]

    def _learn(self, layer: Layer, x: Tensor) -> None:
        run = self._run
        if run is not None and run.x is x and run.version == x._version and layer not in run.layers:
            run.layers.append(layer)
            return
        if run is not None:
            self._groups[id(run.layers[0])] = _joined(run.layers, x)
        self._run = _Run([layer], x, x._version)


@dataclass
class _Run:
    """Layers that were called with one tensor, one after the other."""

    layers: list[Layer]
    x: Tensor
    version: int


@dataclass
class _Held:
    """Outputs that wait for the calls of their layers, by their identity."""

    x: Tensor
    version: int
    outputs: dict[int, tuple[_Member, Tensor]]


class _Member:
    """A layer of a group, and its tensors as they were when it was joined."""

    def __init__(self, layer: Layer, part: ScaledWeight) -> None:
        self.layer, self.key, self.part, self.rows = weakref.ref(layer), id(layer), part, layer.rows
        buffers, parameters = layer._buffers, layer._parameters
        places = [(buffers, "spon_threshold"), (buffers, "spon_center")]
        places.append((parameters if "bias" in parameters else buffers, "bias"))
        self.tensors = [(*place, *_state(place[0][place[1]])) for place in places]

    def fits(self) -> bool:
        """Whether the layer still has the tensors that were joined."""
        if self.rows.weight is not self.part:
            return False
        for place, name, tensor, address, version, trained in self.tensors:
            now = place.get(name)
            if now is not tensor:
                return False
            if now is not None and (now.data_ptr(), now._version, now.requires_grad) != (address, version, trained):
                return False
        return True


def _state(tensor: Tensor | None) -> tuple[Any, ...]:
    if tensor is None:
        return None, 0, 0, False
    return tensor, tensor.data_ptr(), tensor._version, tensor.requires_grad


class _Group:
    """Layers whose codes lie side by side in `weight`, of which each layer's own are a view."""

    def __init__(self, layers: Sequence[Layer], weight: ScaledWeight) -> None:
        self.weight, self.members, self.sizes = weight, [], [layer.out_features for layer in layers]
        begin = 0
        for layer in layers:
            if len(layers) > 1:
                layer.rows.weight = weight.shard(begin, begin + layer.out_features)
            self.members.append(_Member(layer, layer.row_weight))
            begin += layer.out_features
        first = layers[0]
        self.center, bias = first.spon_center, _joined_bias(layers)
        self.tensors = first.spon_threshold.contiguous(), bias  # the call knows their addresses alone
        self.call = Prepared(weight, *self.tensors, exact=first.exact)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs of the layers, in their order."""
        y = self.call(x if self.center is None else deviation(x, self.center))
        return [y] if len(self.sizes) == 1 else [part.contiguous() for part in y.split(self.sizes, -1)]


def _joined_bias(layers: Sequence[Layer]) -> Tensor | None:
    biases = [layer.bias for layer in layers]
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    pairs = zip(layers, biases, strict=True)
    return torch.cat([like.new_zeros(layer.out_features) if bias is None else bias.detach() for layer, bias in pairs])


@torch.no_grad()
def _joined(layers: Sequence[Layer], x: Tensor) -> _Group | None:
    """The layers as a group; None where they differ in more than their outputs, or the kernel does not take them.

    Args:
        layers: called one after the other.
        x: what one of them reads.
    """
    weights = [layer.row_weight for layer in layers]
    first, lead = weights[0], layers[0]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if len({bias.dtype for bias in biases}) > 1 or any(bias.requires_grad for bias in biases):
        return None
    if choose(Problem(x.new_empty((1, first.in_features)), first)).run is not known_calls.sparse_linear:
        return None
    if len(layers) == 1:
        return _Group(layers, first)
    if any(weight.out_features % weight.unit for weight in weights):
        return None
    for layer, weight in zip(layers[1:], weights[1:], strict=True):
        same = _layout(weight) == _layout(first) and layer.exact == lead.exact
        masks = ((layer.spon_threshold, lead.spon_threshold), (layer.spon_center, lead.spon_center))
        order = (weight.group_of_row, first.group_of_row)
        if not same or not all(_equal(one, other) for one, other in (*masks, order)):
            return None
    parts: dict[str, Any] = {}
    for name in ("codes", "scales", "zeros", "offsets"):
        tensors = [getattr(weight, name) for weight in weights]
        parts[name] = None if tensors[0] is None else torch.cat(tensors, 1)
    return _Group(layers, replace(first, **parts))


def _layout(weight: ScaledWeight) -> tuple[Any, ...]:
    kinds = (None if part is None else part.dtype for part in (weight.scales, weight.zeros, weight.offsets))
    groups = weight.scales.shape[0]
    return type(weight), weight.codes.dtype, weight.in_features, groups, weight.group_size, *kinds


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)
