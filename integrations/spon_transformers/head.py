# SPDX-License-Identifier: Apache-2.0
"""A merged model's output head in int8: dense, through the kernels of the sparse layers.

The file keeps the head in floating point, tied or not, and says ``head: int8``; a head is rounded once it is loaded,
here and by `spon_vllm.head`. Hosts that do not read the field run the head as the file has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.adapter.merged import HEADS
from spon_plugin.errors import SponError
from spon_plugin.kernels import sparse_linear
from spon_plugin.weights import linear_features, weight_of
from spon_plugin.weights.dense import DenseWeight
from spon_plugin.weights.int8 import Int8Weight, round_to_int8


class Int8Head(nn.Module):
    """``y = W x + bias`` on int8 codes with a scale for each output; every input is read.

    Args:
        linear: the head in floating point.
        saved: whether a state dict has its decoded weight. One that is tied to the embeddings is saved with them.

    Attributes:
        in_features: length of an input.
        out_features: length of an output.
        codes: int8 ``[in_features, out_features]``.
        scales: float32 ``[1, out_features]``.
        bias: ``[out_features]``, or None.
    """

    codes: Tensor
    scales: Tensor
    nothing: Tensor
    bias: Any

    def __init__(self, linear: nn.Module, saved: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear_features(linear)
        weight: Any = linear.weight
        rounded = round_to_int8(weight.detach())
        self.dtype, self.saved = weight.dtype, saved
        self.register_buffer("codes", rounded.codes, persistent=False)
        self.register_buffer("scales", rounded.scales, persistent=False)
        self.register_buffer("nothing", torch.zeros(1, device=weight.device), persistent=False)
        self.register_parameter("bias", getattr(linear, "bias", None))

    @property
    def row_weight(self) -> Int8Weight:
        """The weight as the kernels read it."""
        return Int8Weight(self.codes, self.scales, group_size=self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return sparse_linear(x, self.row_weight, self.nothing, None if self.bias is None else self.bias.float())

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Head:
        scales, nothing = self.scales, self.nothing
        super()._apply(fn, recurse)
        self.scales, self.nothing = scales.to(self.codes.device), nothing.to(self.codes.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.saved:
            destination[prefix + "weight"] = self.row_weight.dense(self.dtype).t().contiguous()

    def extra_repr(self) -> str:
        """Show the features."""
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


def round_head(model: Any, head: str | None) -> None:
    """Round the output head of a loaded model, in place; a backbone has none, and one that is quantized stays so.

    Args:
        model: a `PreTrainedModel`.
        head: None, which leaves it, or ``"int8"``.
    """
    linear = model.get_output_embeddings() if head is not None else None
    if linear is None or not can_round(linear):
        return
    path = next(path for path, module in model.named_modules() if module is linear)
    tied = linear.weight is getattr(model.get_input_embeddings(), "weight", None)
    with torch.no_grad():
        model.set_submodule(path, Int8Head(linear, saved=not tied))
    # A tied head has no tensor any more that could be tied again.
    getattr(model, "all_tied_weights_keys", {}).pop(f"{path}.weight", None)


def can_round(linear: Any) -> bool:
    """Whether a head is a linear layer in floating point."""
    return isinstance(linear, nn.Linear) and isinstance(weight_of(linear), DenseWeight)


def ask_for_head(model: Any, head: str | None) -> None:
    """Have the checkpoint that a merged model is saved to ask for its head in `head`, once it is loaded.

    Args:
        model: a merged `PreTrainedModel`.
        head: ``"int8"``, or None for the head as it is.

    Raises:
        SponError: no such head, or the model's output head is no linear layer in floating point.
    """
    if head not in (None, *HEADS):
        raise SponError.of("head", head, "one of " + ", ".join(HEADS))
    linear = model.get_output_embeddings()
    if head is not None and not can_round(linear):
        received = f"a head that is a {type(linear).__name__}"
        raise SponError.of("head", received, "a linear layer in floating point", "Leave --head out.")
    model.config.quantization_config.head = head
