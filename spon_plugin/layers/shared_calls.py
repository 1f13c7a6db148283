# SPDX-License-Identifier: Apache-2.0
"""One call for the layers of a decoder that read the same tensor: q, k and v; gate and up.

Decoding, a layer's call costs some tens of microseconds before it reads a byte. Layers that are called one after the
other with the very same tensor, and mask it in the same way, are therefore multiplied in one go, by one mask and one
list of active inputs; the first one that is called does it for all. Codes are put side by side for that, as narrow
outputs are read at a part of the speed of wide ones; matrices stay where they are. Arguments are checked once, and the
kernel is called past the dispatcher, also for a quantized layer that is by itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from spon_plugin.kernels.arguments import is_plain
from spon_plugin.kernels.cpu import kernel, known_calls
from spon_plugin.kernels.cpu.kernel import Stage
from spon_plugin.kernels.cpu.scaled import Prepared
from spon_plugin.kernels.few_rows import CPU_ROWS
from spon_plugin.kernels.table import Problem, choose
from spon_plugin.layers.watched import Place, WatchedTensors
from spon_plugin.masking import deviation
from spon_plugin.weights.scaled import ScaledWeight


class Layer(Protocol):
    """What is asked of a layer: `SparseLinear`, or `SparseQuantizedLinear` with `rows`, `row_weight` and `exact`."""

    in_features: int
    out_features: int
    bias: Any
    spon_threshold: Tensor
    spon_center: Tensor | None
    _parameters: dict[str, Any]
    _buffers: dict[str, Any]

    @property
    def weight_t(self) -> Tensor:
        """The weight ``[in_features, out_features]``, of a layer that is not quantized."""


class SharedCalls:
    """Calls the CPU kernel for the layers of one module, and finds out by itself which of them read the same tensor.

    An output is handed to the layer it belongs to, once, and only for the very tensor that it was made of, if neither
    that nor the layer's own tensors have been written to since. Copies and pickles of a model find out anew.
    """

    def __init__(self) -> None:
        self._groups: dict[int, Group | None] = {}  # by the identity of their first layer; None where it is no use
        self._run: _Run | None = None
        self._held: _Held | None = None
        self._learning = threading.Lock()  # joining layers changes where they lie

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
            if key not in self._groups and is_plain(x, x, None) and self._learning.acquire(blocking=False):
                try:
                    self._learn(layer, x)
                finally:
                    self._learning.release()
            return None
        if group.members[0].layer() is not layer or not group.fits():
            self._groups.pop(key, None)
            return None
        if not group.takes(x):
            return None
        parts = group(x)
        if len(parts) > 1:
            pairs = zip(group.members[1:], parts[1:], strict=True)
            self._held = _Held(x, x._version, {member.key: (member, part) for member, part in pairs})
        return parts[0]

    def group(self, layers: Sequence[Layer], x: Tensor) -> Group | None:
        """Layers that read one tensor, as the calls of these find them; None where they are not multiplied in one go.

        Args:
            layers: in the order of their calls.
            x: what they read.
        """
        key = id(layers[0])
        with self._learning:
            found = self._groups.get(key)
            if found is None or not found.is_of(layers) or not found.fits():
                found = self._groups[key] = _joined(layers, x)
        return found

    def _learn(self, layer: Layer, x: Tensor) -> None:
        run = self._run
        if run is not None and run.x is x and run.version == x._version and layer not in run.layers:
            run.layers.append(layer)
            return
        if run is not None:
            # A matrix by itself is called past the dispatcher already, by `LayerCall`.
            known = len(run.layers) > 1 or hasattr(run.layers[0], "rows")
            self._groups[id(run.layers[0])] = _joined(run.layers, run.x) if known else None
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

    def __init__(self, layer: Any) -> None:
        self.layer, self.key = weakref.ref(layer), id(layer)
        self.rows, self.exact = getattr(layer, "rows", None), getattr(layer, "exact", None)
        self.part = None if self.rows is None else self.rows.weight
        self.places = _places(layer)
        self.tensors = WatchedTensors(self.places)

    def fits(self) -> bool:
        """Whether the layer still is what was joined."""
        if self.rows is not None and self.rows.weight is not self.part:
            return False
        return getattr(self.layer(), "exact", None) == self.exact and self.tensors.are_same()


def _places(layer: Any) -> list[Place]:
    """Where the tensors of a layer are."""
    buffers, parameters = layer._buffers, layer._parameters
    places = [(buffers, "spon_threshold"), (buffers, "spon_center")]
    places.append((parameters if "bias" in parameters else buffers, "bias"))
    return [*places, *layer.rows.places] if hasattr(layer, "rows") else [*places, (parameters, "weight")]


class Group:
    """Layers that are multiplied in one go.

    Attributes:
        members: the layers, in the order of their calls.
        center: that they have in common, float32 ``[in_features]``, or None.
        in_features: length of their input.
        dtype: what x has to be in; None for any that the kernels take.
    """

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype | None) -> None:
        self.members, self.dtype = [_Member(layer) for layer in layers], dtype
        self.center, self.threshold = layers[0].spon_center, layers[0].spon_threshold
        self.in_features = layers[0].in_features

    def is_of(self, layers: Sequence[Layer]) -> bool:
        """Whether these are the layers."""
        return [member.layer() for member in self.members] == list(layers)

    def fits(self) -> bool:
        """Whether the layers still have the tensors that were joined."""
        return all(member.fits() for member in self.members)

    def takes(self, x: Tensor) -> bool:
        """Whether x is of the group's dtype, and nobody has to see the call."""
        if self.dtype not in (None, x.dtype):
            return False
        if torch.is_grad_enabled() and any(member.tensors.are_trained for member in self.members):
            return False
        return is_plain(x, x, None)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs of the layers, in their order."""
        return self._product(x if self.center is None else deviation(x, self.center))

    def _product(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def scratch_words(self, x: Tensor, threads: int) -> int:
        """Words of 4 bytes of the scratch of a `stage`."""
        raise NotImplementedError

    def stage(self, x: Tensor, outputs: Sequence[Tensor], scratch: Tensor) -> Stage:
        """The product as a stage of a program, past the mask's centre.

        Args:
            x: one row ``[in_features]``, from which the centre has been taken off.
            outputs: of the layers, ``[out_features]`` each, one behind the other.
            scratch: of `scratch_words`.
        """
        raise NotImplementedError


class _Codes(Group):
    """Quantized layers, whose codes lie side by side; each layer's own are a view."""

    def __init__(self, layers: Sequence[Any], weight: ScaledWeight) -> None:
        self.sizes, begin = [layer.out_features for layer in layers], 0
        for layer in layers:
            if len(layers) > 1:
                layer.rows.weight = weight.shard(begin, begin + layer.out_features)
            begin += layer.out_features
        super().__init__(layers, None)
        # The call knows addresses alone.
        self.weight, self.threshold, self.bias = weight, self.threshold.contiguous(), _joined_bias(layers)
        self.call = Prepared(weight, self.threshold, self.bias, exact=layers[0].exact)

    def _product(self, x: Tensor) -> list[Tensor]:
        y = self.call(x)
        return [y] if len(self.sizes) == 1 else [part.contiguous() for part in y.split(self.sizes, -1)]

    def scratch_words(self, x: Tensor, threads: int) -> int:
        return self.call.scratch_words(x, threads)

    def stage(self, x: Tensor, outputs: Sequence[Tensor], scratch: Tensor) -> Stage:
        return self.call.stage(x, outputs[0], scratch)


class _Matrices(Group):
    """Layers on matrices, which one call reads where they lie."""

    def __init__(self, layers: Sequence[Layer], call: kernel.Prepared) -> None:
        super().__init__(layers, call.dtype)
        self.call = call

    def _product(self, x: Tensor) -> list[Tensor]:
        return self.call(x, x.numel() // self.call.in_features)

    def scratch_words(self, x: Tensor, threads: int) -> int:
        return self.call.scratch_words(threads)

    def stage(self, x: Tensor, outputs: Sequence[Tensor], scratch: Tensor) -> Stage:
        return self.call.stage(x, outputs, scratch)


def _joined_bias(layers: Sequence[Layer]) -> Tensor | None:
    biases = [layer.bias for layer in layers]
    if len(layers) == 1:
        return None if biases[0] is None else biases[0].detach().contiguous()
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    pairs = zip(layers, biases, strict=True)
    return torch.cat([like.new_zeros(layer.out_features) if bias is None else bias.detach() for layer, bias in pairs])


@torch.no_grad()
def _joined(layers: Sequence[Any], x: Tensor) -> Group | None:
    """The layers as a group; None where they differ in more than their outputs, or the kernel does not take them.

    Args:
        layers: called one after the other.
        x: what one of them reads.
    """
    lead = layers[0]
    held = (tensor for layer in layers for tensor in (layer.spon_threshold, layer.spon_center, layer.bias))
    if not all(tensor.is_cpu for tensor in held if tensor is not None):  # offloaded between its calls
        return None
    for layer in layers:
        if hasattr(layer, "rows"):
            layer.row_weight  # noqa: B018 (its places are known once it is made)
        tensors = [place.get(name) for place, name in _places(layer)]
        if any(isinstance(tensor, Tensor) and tensor.is_inference() for tensor in tensors):
            return None  # torch counts no writes to these
    for layer in layers[1:]:
        masks = ((layer.spon_threshold, lead.spon_threshold), (layer.spon_center, lead.spon_center))
        if type(layer) is not type(lead) or not all(_equal(one, other) for one, other in masks):
            return None
    if hasattr(lead, "rows"):
        return _joined_codes(layers, x)
    weights, biases = [layer.weight_t for layer in layers], [layer.bias for layer in layers]
    call = kernel.prepare(weights, lead.spon_threshold, biases)
    return None if call is None else _Matrices(layers, call)


def _joined_codes(layers: Sequence[Any], x: Tensor) -> _Codes | None:
    weights = [layer.row_weight for layer in layers]
    first, lead = weights[0], layers[0]
    if len({layer.bias.dtype for layer in layers if layer.bias is not None}) > 1:
        return None
    if choose(Problem(x.new_empty((1, first.in_features)), first)).run is not known_calls.sparse_linear:
        return None
    if len(layers) == 1:
        return _Codes(layers, first)
    if any(weight.out_features % weight.unit for weight in weights):
        return None
    for layer, weight in zip(layers[1:], weights[1:], strict=True):
        same = _layout(weight) == _layout(first) and layer.exact == lead.exact
        if not same or not _equal(weight.group_of_row, first.group_of_row):
            return None
    parts: dict[str, Any] = {}
    for name in ("codes", "scales", "zeros", "offsets"):
        tensors = [getattr(weight, name) for weight in weights]
        parts[name] = None if tensors[0] is None else torch.cat(tensors, 1)
    return _Codes(layers, replace(first, **parts))


def _layout(weight: ScaledWeight) -> tuple[Any, ...]:
    kinds = (None if part is None else part.dtype for part in (weight.scales, weight.zeros, weight.offsets))
    groups = weight.scales.shape[0]
    return type(weight), weight.codes.dtype, weight.in_features, groups, weight.group_size, *kinds


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)
