# SPDX-License-Identifier: Apache-2.0
"""AdamW over many small vectors of different rates, in a dozen launches a step: alphas are one per linear."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class FlatAdamW:
    """`torch.optim.AdamW` with a rate and a decay for each parameter; all of them lie in one tensor.

    torch's own takes a group, and its kernels, for each rate. Parameters become views of one tensor.

    Args:
        parameters: leaves of one dtype on one device, each of which gets a gradient in every step.
        rates: the highest rate of each.
        decays: AdamW's `weight_decay` of each.
        max_grad_norm: gradients are clipped to this norm, over all parameters.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        rates: Sequence[float],
        decays: Sequence[float],
        max_grad_norm: float = float("inf"),
    ) -> None:
        self.parameters, self.max_grad_norm = list(parameters), max_grad_norm
        sizes = [parameter.numel() for parameter in self.parameters]
        self._flat = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, self._flat.split(sizes), strict=True):
            parameter.data = part.view_as(parameter)
        count = torch.tensor(sizes)
        self._rates = torch.tensor(list(rates), dtype=torch.float64).repeat_interleave(count).to(self._flat.device)
        self._decays = torch.tensor(list(decays), dtype=torch.float64).repeat_interleave(count).to(self._flat.device)
        self._mean, self._square = torch.zeros_like(self._flat), torch.zeros_like(self._flat)
        self._steps = 0

    def step(self, factor: float = 1.0) -> Tensor:
        """Take one step by the gradients, and let them go.

        Args:
            factor: of every rate.

        Returns:
            The norm of the gradient before clipping, on the parameters' device.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        gradient = torch.cat([parameter.grad.flatten() for parameter in self.parameters if parameter.grad is not None])
        self._steps += 1
        self._mean.lerp_(gradient, 1 - _BETA1)
        self._square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
        self._flat.mul_((1 - self._rates * (factor * self._decays)).to(self._flat.dtype))
        sizes = (self._rates * (-factor / (1 - _BETA1**self._steps))).to(self._flat.dtype)
        root = (self._square.sqrt() / math.sqrt(1 - _BETA2**self._steps)).add_(_EPSILON)
        self._flat.addcdiv_(self._mean * sizes, root)
        for parameter in self.parameters:
            parameter.grad = None
        return norm
