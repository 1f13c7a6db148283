# SPDX-License-Identifier: Apache-2.0
"""Dense linears on weights that lie by inputs, as sparse layers read them: one copy of a weight serves both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.kernels.cpu.layer_call import LayerCall
from spon_plugin.kernels.gemm import dense_linear
from spon_plugin.layers.sparse_quantized import QuantizedLayer
from spon_plugin.weights.linears import linear_features

# Below every |x|: zeros are multiplied, too. Otherwise they would shift the threads' shares of the inputs, and with
# them the order of the sums, so that a row's bits would depend on the rows beside it.
_BELOW_ALL = -1.0
_NO_THRESHOLD = torch.full((1,), _BELOW_ALL, dtype=torch.float32, device="cpu")


class RowLinear(nn.Linear):
    """``y = W x + b``, as the linear in whose place it is, whose parameters it has.

    Up to `few_rows.CPU_ROWS` rows on a CPU run in the sparse layers' kernel, without a mask: it reads the weight once
    for all of them, and a row has the bits that it has by itself. More rows are the device's own product, or one of
    panels, as in `kernels.gemm`.

    Args:
        linear: `torch.nn.Linear` with a floating-point weight, which is laid out anew in place: ``[in_features,
            out_features]`` contiguous, under the same shape. Whoever else holds that parameter sees the same values.

    Attributes:
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]``, or None.
    """

    def __init__(self, linear: nn.Module) -> None:
        in_features, out_features = linear_features(linear)
        super().__init__(in_features, out_features, bias=False, device="meta")
        self._parameters.update({name: linear._parameters[name] for name in ("weight", "bias")})
        weight = self.weight.data
        if not weight.t().is_contiguous():
            self.weight.data = weight.t().contiguous().t()
        self._few_rows = LayerCall()
        self.train(linear.training)

    @property
    def weight_t(self) -> Tensor:
        """The weight as ``[in_features, out_features]``, a view."""
        return self.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        y = None if torch.compiler.is_compiling() else self._few_rows(self, x, _NO_THRESHOLD)
        return dense_linear(x, self.weight_t, self.bias) if y is None else y

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:  # safetensors takes contiguous tensors only
            destination[prefix + "weight"] = destination[prefix + "weight"].contiguous()


class RowQuantizedLinear(QuantizedLayer):
    """``y = W x + b`` on the codes of a quantized linear, by the kernels of the sparse layers, without a mask.

    Four-bit weights are multiplied by inputs as they are, so that few rows and many compute the same; see
    `QuantizedLayer.exact`.

    Args:
        host: see `QuantizedLayer`.
    """

    exact = True

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        self._no_threshold = _NO_THRESHOLD.to(self._device)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return self._product(x, self._no_threshold, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._no_threshold = _NO_THRESHOLD.to(self._device)
        return self
