# SPDX-License-Identifier: Apache-2.0
"""What a merged checkpoint has for one of vLLM's linear layers: room for its tensors, and what was loaded there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.parameter import ChannelQuantScaleParameter, PerTensorScaleParameter
from vllm.model_executor.utils import set_weight_attrs

from spon_plugin.adapter.mask import CENTER, THRESHOLD, Mask
from spon_plugin.adapter.merged import DENSE_BIAS, Announced
from spon_vllm.checks import check_centers


class _ChannelParameter(PerTensorScaleParameter):
    """float32 ``[in_features]``, or ``[n_shards, in_features]``, of the whole layer: loaded without sharding.

    It counts among vLLM's scales per tensor because those, too, are one for each linear of a fused layer.
    """

    def load_merged_column_weight(self, loaded_weight: Tensor, shard_id: Any = 0, **_: Any) -> None:
        """Fill the row of one linear; a threshold that is one number fills it evenly."""
        row = self.data if self.data.dim() == 1 else self.data[self._shard_id_as_int(shard_id)]
        row.copy_(loaded_weight)

    def load_qkv_weight(self, loaded_weight: Tensor, shard_id: Any = 0, **_: Any) -> None:
        """As `load_merged_column_weight`."""
        self.load_merged_column_weight(loaded_weight, shard_id)


def expect_tensors(
    layer: Any,
    announced: Sequence[Announced],
    sizes: Sequence[int],
    in_features: int,
    dtype: torch.dtype,
    has_dense_bias: bool,
    loader: Any,
) -> None:
    """Let vLLM's loader fill what a merged checkpoint has for every sparse linear.

    Args:
        layer: vLLM's, with its weight.
        announced: what the checkpoint's config says of the masks of its linears.
        sizes: this rank's outputs, of each linear in the layer.
        in_features: of the whole layer.
        dtype: of the biases.
        has_dense_bias: whether the dense model's bias is beside the folded one.
        loader: vLLM's for the layer's parameters.
    """
    count, width = len(sizes), sum(sizes)
    # As with the weight: NaN stays where the checkpoint has no such tensor.
    vector = torch.full((in_features,) if count == 1 else (count, in_features), torch.nan, dtype=torch.float32)
    threshold: Any = PerTensorScaleParameter(data=torch.zeros(count, dtype=torch.float32), weight_loader=loader)
    if any(mask.threshold is None for mask in announced):
        threshold = _ChannelParameter(data=vector, weight_loader=loader)
    layer.register_parameter(THRESHOLD, threshold)
    if any(mask.has_center for mask in announced):
        layer.register_parameter(CENTER, _ChannelParameter(data=vector.clone(), weight_loader=loader))
    if has_dense_bias:
        bias = ChannelQuantScaleParameter(data=torch.zeros(width, dtype=dtype), output_dim=0, weight_loader=loader)
        layer.register_parameter(DENSE_BIAS, bias)
    # The folded bias is called `bias`. A layer that vLLM makes without one sets it to None after `create_weights`
    # returns, and its loader would then skip the tensor: put a parameter in the place of that None.
    register = layer.register_parameter

    def register_bias(name: str, parameter: Any) -> None:
        if name == "bias":
            del layer.register_parameter
            if parameter is None:
                parameter = nn.Parameter(torch.zeros(width, dtype=dtype), requires_grad=False)
                set_weight_attrs(parameter, {"output_dim": 0, "weight_loader": layer.weight_loader})
        register(name, parameter)

    layer.register_parameter = register_bias


def take_masks(layer: Any, paths: Sequence[str], announced: Sequence[Announced], in_features: int) -> list[Mask]:
    """Take the vectors that vLLM's loader has brought out of the layer's parameters.

    Args:
        layer: vLLM's, after `expect_tensors` and loading.
        paths: of its linears, for errors.
        announced: as there.
        in_features: as there.

    Raises:
        SponError: what the checkpoint holds is missing, wrong, or several centres for one input.
    """
    masks = []
    for index, (path, each) in enumerate(zip(paths, announced, strict=True)):
        found = {name: getattr(layer, name).data for name in each.vectors}
        rows = {name: data if data.dim() == 1 else data[index] for name, data in found.items()}
        vectors = {name: row.float().cpu().clone() for name, row in rows.items()}
        masks.append(each.mask(path, in_features, vectors))
    check_centers(dict(zip(paths, (mask.center for mask in masks), strict=True)), "one layer")
    del layer.spon_threshold
    if hasattr(layer, "spon_center"):
        del layer.spon_center
    return masks


def take_bias(layer: Any, adds_bias: bool, row_parallel: bool, has_dense_bias: bool) -> Tensor:
    """Tell the checkpoint's two biases apart: `layer.bias` becomes the dense one, the result is the folded one.

    Args:
        layer: vLLM's, after `expect_tensors` and loading.
        adds_bias: whether this rank adds the dense model's bias.
        row_parallel: whether the layer's ranks share its inputs.
        has_dense_bias: as in `expect_tensors`.
    """
    folded = layer.bias.data.to(torch.float32, copy=True)
    if has_dense_bias:
        dense = layer.spon_dense_bias.data
        del layer.spon_dense_bias
        layer.bias.data.copy_(dense)
    elif layer.skip_bias_add:
        return torch.zeros_like(folded)
    if adds_bias:
        return folded
    return folded - layer.bias.data.float() if not row_parallel or layer.tp_rank == 0 else torch.zeros_like(folded)
