# SPDX-License-Identifier: Apache-2.0
"""The fold of a vector over a layer's inputs into its bias."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from spon_plugin.errors import SponError
from spon_plugin.weights.linears import weight_of


@torch.no_grad()
def fold_alpha(linear: nn.Module, alpha: Tensor, name: str = "layer") -> Tensor:
    """``W alpha``, the bias that a spontaneous activation comes down to (SPON, arXiv 2512.12744, eq. 5).

    A weight whose values can be read, in whatever format, is multiplied in float32. Any other is asked what it
    computes, as ``linear(alpha) - linear(0)``; see `weights.weight_of`.

    Args:
        linear: a linear layer, of any weight format.
        alpha: ``[in_features]``.
        name: the layer's name, for the error.

    Returns:
        float32 ``[out_features]`` (float64 for a float64 weight), on the device of the weight.

    Raises:
        SponError: alpha has another length than the layer's input.
    """
    weight = weight_of(linear, name=name)
    if tuple(alpha.shape) != (weight.in_features,):
        raise SponError.of(f"{name}: alpha", tuple(alpha.shape), f"shape ({weight.in_features},), its in_features")
    alpha = alpha.detach()
    held = next(chain(linear.parameters(), linear.buffers()), alpha)
    return weight.product(alpha if held.is_meta else alpha.to(held.device))
