# SPDX-License-Identifier: Apache-2.0
"""`SparseQuantizedLinear`: the layer of a merged model whose base holds its weight in 8 or 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.errors import SponError
from spon_plugin.kernels import sparse_linear
from spon_plugin.kernels.table import Problem, choose
from spon_plugin.layers.sparse_linear import SparseLayer, sparse_like
from spon_plugin.layers.watched import Place, WatchedTensors
from spon_plugin.weights import Opaque, RowWeight
from spon_plugin.weights.dense import DenseWeight
from spon_plugin.weights.linears import linear_features, weight_of
from spon_plugin.weights.scaled import ScaledWeight


class KeptRows:
    """A host's codes as the kernels read them; layers over one host's tensors share it, and so the copy.

    Attributes:
        weight: None before they are first asked for.
        places: of the host's tensors that they were made of.
    """

    def __init__(self) -> None:
        self.weight: ScaledWeight | None = None
        self.places: list[Place] = []
        self._tensors = WatchedTensors([])

    def keep(self, weight: ScaledWeight, places: list[Place]) -> ScaledWeight:
        """Keep a weight, as long as the tensors at these places are what they are."""
        self.weight, self.places, self._tensors = weight, places, WatchedTensors(places)
        return weight

    def are_same(self) -> bool:
        """Whether the host still has the tensors that the weight was made of, and nobody has written to them."""
        return self._tensors.are_same()


class QuantizedLayer(nn.Module):
    """What sparse and dense layers over a quantized linear share: its tensors, and the codes by input rows.

    What is saved is the host's format. Next to the host's codes, packed as the host likes them, lies a copy by inputs,
    so that a masked input's codes stay unread; `arrange_for_kernels` makes it, or the first use. It is made anew where
    the host's tensors are replaced or written to, other than through their `data`, which torch does not count.

    Args:
        host: the quantized linear; it must not be used on its own any more.

    Attributes:
        in_features: length of an input.
        out_features: length of an output.
        bias: ``[out_features]``, or None.
        exact: whether four-bit weights are multiplied by inputs as they are; see `kernels.sparse_linear`.

    Raises:
        SponError: `host` is no linear, or holds its weight in no format with rows and scales.
    """

    host: nn.Module
    bias: Any
    exact: bool = False

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.in_features, self.out_features = linear_features(host)
        # Not a member: its tensors are this layer's, under the same names.
        object.__setattr__(self, "host", host)
        self._parameters, self._buffers = host._parameters, host._buffers
        self._non_persistent_buffers_set = host._non_persistent_buffers_set
        if "bias" not in self._parameters and "bias" not in self._buffers:
            self.register_parameter("bias", None)
        self.rows = KeptRows()
        self.train(host.training)

    @property
    def _device(self) -> torch.device:
        return next(
            tensor.device for tensor in (*self._parameters.values(), *self._buffers.values()) if tensor is not None
        )

    @property
    def row_weight(self) -> ScaledWeight:
        """The weight as the kernels read it."""
        weight = self.rows.weight
        if weight is None or weight.codes.device != self._device or not self.rows.are_same():
            own: list[Place] = [(tensors, name) for tensors in (self._parameters, self._buffers) for name in tensors]
            places = [place for place in own if place[1] != "bias" and not place[1].startswith("spon_")]
            # Not as tensors of inference, which could never be trained through.
            with torch.inference_mode(False), torch.no_grad():
                weight = self.rows.keep(scaled_weight(self.host).arranged(), places)
        return weight

    def arrange_for_kernels(self) -> None:
        """Make the copy that the kernels read, unless the weight has no values yet."""
        if self._device.type != "meta":
            self.rows.weight = None
            self.row_weight  # noqa: B018

    def _product(self, x: Tensor, threshold: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None and bias.dtype not in (torch.float32, x.dtype):
            bias = bias.float()
        return sparse_linear(x, self.row_weight, threshold, bias, exact=self.exact)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.rows.weight = None
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.host._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.rows.weight = None
        self.host._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        """Show the features, and the host's class."""
        return f"in_features={self.in_features}, out_features={self.out_features}, host={type(self.host).__name__}"


class SparseQuantizedLinear(QuantizedLayer, SparseLayer):
    """``y = W S(x) + bias`` on the codes of a quantized linear, whose tensors it takes over by their own names.

    What is saved is therefore the host's format, with the folded bias and the mask's tensors beside it.

    Args:
        host: as in `QuantizedLayer`.

    Attributes:
        spon_threshold: as in `SparseLinear`, like the other buffers.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        if "spon_threshold" not in self._buffers:
            self._register_spon_buffers(self._device)

    def keep_dense_bias(self, bias: Tensor | None = None) -> None:
        """See `SparseLayer.keep_dense_bias`."""
        zeros = torch.zeros(self.out_features, dtype=self._output_dtype, device=self._device)
        self.spon_dense_bias = zeros if bias is None else bias.detach().clone()

    @property
    def kernel(self) -> str:
        """See `SparseLayer.kernel`."""
        row = torch.empty((1, self.in_features), dtype=self._output_dtype, device=self._device)
        return f"spon::sparse_linear_rows ({choose(Problem(row, self.row_weight)).name}), decoded for many rows"

    @property
    def _output_dtype(self) -> torch.dtype:
        return self.bias.dtype if self.bias is not None else torch.get_default_dtype()

    def _masked(self, x: Tensor) -> Tensor:
        return self._product(x, self.spon_threshold, self.bias)

    def _dense(self, kept: Tensor, bias: Tensor | None) -> Tensor:
        return self._product(kept, torch.zeros_like(self.spon_threshold[:1]), bias)


def sparse_layer(linear: nn.Module, name: str = "layer") -> SparseLayer:
    """The sparse layer that takes the place of a linear of any kind, and takes over its tensors; the threshold is 0.

    Args:
        linear: floating-point, or quantized in a format with rows and scales; it must not be used on its own any more.
        name: of the linear, for the error.

    Raises:
        SponError: it is neither.
    """
    weight = weight_of(linear, name=name)
    if isinstance(weight, ScaledWeight):
        return SparseQuantizedLinear(linear)
    if not isinstance(weight, DenseWeight):
        raise not_by_rows(name, weight)
    layer = sparse_like(linear, "meta")
    layer._parameters.update(linear._parameters)
    layer._buffers.update(linear._buffers)
    return layer


def scaled_weight(module: nn.Module, name: str = "layer") -> ScaledWeight:
    """The weight of a quantized linear, if its rows of codes can be read.

    Raises:
        SponError: they cannot.
    """
    weight = weight_of(module, name=name)
    if not isinstance(weight, ScaledWeight):
        raise not_by_rows(name, weight)
    return weight


def not_by_rows(name: str, weight: RowWeight | Opaque, remedy: str = "") -> SponError:
    """The error for a quantized weight that no kernel of ours reads."""
    received = weight.reason if isinstance(weight, Opaque) else weight.format
    return SponError.of(name, received, "codes by input rows, with scales (int8, int4 or FP8)", remedy)
