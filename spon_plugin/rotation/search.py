# SPDX-License-Identifier: Apache-2.0
"""Find the rotation under which masks cost least: Adam in the tangent space of the orthogonal matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spon_plugin.errors import SponError
from spon_plugin.masking import check_sparsity
from spon_plugin.progress import Progress, no_progress
from spon_plugin.rotation.cost import StreamInputs, masked_cost, price_for

STEPS = 800
"""More turn little more on SmolLM2-135M."""
RATE = 4e-3
"""Of Adam, in radians a step and pair of directions at most. Four times as much scatters them: the cost rises first."""
_SITES, _ROWS = 20, 256  # of a step
_PRICED = 100  # steps between two prices
_BETA1, _BETA2, _EPSILON = 0.9, 0.99, 1e-12


def find_rotation(
    sites: Sequence[StreamInputs],
    sparsity: float,
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Tensor:
    """The rotation of the residual stream that makes `cost.masked_cost` least, from none on.

    A step takes the gradient `G` on some rows of some sites; ``Q'G - G'Q`` is its part along the orthogonal matrices,
    as a skew-symmetric matrix, in which Adam keeps its moments; a QR decomposition leads back.

    Args:
        sites: what the sites read; the work is done where and in the dtype that they are in.
        sparsity: the share of their weights that masks will drop, in (0, 1).
        steps: to take.
        seed: of the rows and sites of each step.
        progress: called after each step.

    Returns:
        `Q`, orthogonal, float32 ``[hidden, hidden]``: the stream ``h`` becomes ``h Q``.

    Raises:
        SponError: the sparsity is not between 0 and 1, there are no sites, or the steps are not positive.
    """
    check_masked(sparsity)
    if steps < 1:
        raise SponError.of("steps", steps, "a positive number")
    if not sites:
        raise SponError.of("sites", 0, "some that read the residual stream")
    size, device = sites[0].rows.shape[1], sites[0].rows.device
    rotation = torch.eye(size, device=device)
    mean, square = torch.zeros_like(rotation), torch.zeros_like(rotation)
    generator = torch.Generator().manual_seed(seed)
    price = 0.0
    for step in range(steps):
        if step % _PRICED == 0:
            price = price_for(sites, rotation, sparsity)
        gradient = _gradient(sites, rotation, price, generator)
        mean.lerp_(gradient, 1 - _BETA1)
        square.lerp_(gradient.square(), 1 - _BETA2)
        corrected = (square / (1 - _BETA2 ** (step + 1))).sqrt() + _EPSILON
        direction = mean / (1 - _BETA1 ** (step + 1)) / corrected
        rate = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        rotation = _nearest(rotation - rate * (rotation @ direction))
        progress(step + 1, steps)
    return rotation


def check_masked(sparsity: float) -> None:
    """Raise `SponError` unless a rotation can be chosen for that sparsity: it lies in (0, 1)."""
    if not check_sparsity(sparsity):
        raise SponError.of("sparsity", sparsity, "more than 0, as without masks every rotation is as good", "Try 0.5.")


def _gradient(sites: Sequence[StreamInputs], rotation: Tensor, price: float, generator: torch.Generator) -> Tensor:
    """The skew-symmetric gradient on some rows of some sites."""
    point = rotation.clone().requires_grad_()
    with torch.enable_grad():
        total = torch.zeros((), device=rotation.device)
        for index in torch.randperm(len(sites), generator=generator)[:_SITES].tolist():
            count = len(sites[index].rows)
            rows = torch.randperm(count, generator=generator)[:_ROWS].to(rotation.device)
            total = total + masked_cost(sites[index], point, price, rows)
        (gradient,) = torch.autograd.grad(total, point)
    turned = rotation.t() @ gradient
    return turned - turned.t()


def _nearest(matrix: Tensor) -> Tensor:
    """The orthogonal factor of a matrix that is nearly orthogonal, its columns' signs kept."""
    q, r = torch.linalg.qr(matrix)
    return q * r.diagonal().sign()
