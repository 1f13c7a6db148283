# SPDX-License-Identifier: Apache-2.0
"""Round a linear's weight for the inputs that masks leave: later inputs make good what rounding the earlier ones did.

`W` becomes `V` on a grid of few bits such that ``V u`` is near ``W x``, where `x` is what the dense model feeds the
linear and `u` what the sparse one does: masked, and after layers that were rounded before. Two steps:

- the best `V` of any values, held to `W` by a ridge: ``(W (E[x u'] + r I)) (E[u u'] + r I)^-1``;
- its rounding, input by input, the error spread over the inputs that are still to come by ``E[u u']^-1`` (GPTQ, arXiv
  2210.17323, section 3, in its Cholesky form).

Attention sinks are tokens whose inputs are hundreds of times as long as others: they would be all that counts, and left
out, what happens to them would not count at all, which ruins a model. They count as `LONGEST` times the median.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from spon_plugin.errors import SponError

RIDGE = 1.0
RIDGES = (1e-3, 1e6)
"""Below, float32 may not solve it; above, nothing is fitted."""
DAMPING = 0.01
LONGEST = 10.0
_BLOCK = 128
_TINY = 1e-12


def check_ridge(ridge: float) -> float:
    """The ridge, if it can be used.

    Raises:
        SponError: it cannot.
    """
    least, most = RIDGES
    if not least <= ridge <= most:
        raise SponError.of("ridge", ridge, f"a number from {least:g} to {most:g}")
    return ridge


class Moments:
    """Second moments of what a linear reads in the sparse model, and of it with what it reads in the dense one.

    Args:
        in_features: of the linear.
        device: where they are summed, in float32.

    Attributes:
        reads: the sum of ``u u'``, ``[in_features, in_features]``.
        exact: the sum of ``x u'``, likewise.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.reads = torch.zeros(in_features, in_features, device=device)
        self.exact = torch.zeros_like(self.reads)

    def add(self, reads: Tensor, exact: Tensor) -> None:
        """See some tokens: ``[tokens, in_features]`` of the sparse model, and the same tokens of the dense one."""
        reads, exact = reads.float(), exact.float()
        norms = reads.norm(dim=1, keepdim=True)
        share = (LONGEST * norms.median() / norms.clamp(min=_TINY)).clamp(max=1)
        reads = reads * share
        self.reads += reads.t() @ reads
        self.exact += (exact * share).t() @ reads

    @property
    def typical(self) -> float:
        """The mean second moment of an input; 0 where nothing was read."""
        return float(self.reads.diagonal().mean())

    @functools.cached_property
    def spread(self) -> Tensor:
        """The upper Cholesky factor of the inverse of `reads`, damped; asked for when all has been added."""
        damped = self.reads + DAMPING * (self.typical or 1.0) * torch.eye(len(self.reads), device=self.reads.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return torch.linalg.cholesky(inverse, upper=True)


def fitted(weight: Tensor, moments: Moments, ridge: float = RIDGE) -> Tensor:
    """The weight of any values whose outputs on the sparse model's inputs are nearest to the dense model's.

    Args:
        weight: ``[out_features, in_features]``, float32.
        moments: of its inputs.
        ridge: how much staying near `weight` counts, in units of the mean second moment of an input.
    """
    if not moments.typical:
        return weight
    held = ridge * moments.typical * torch.eye(weight.shape[1], device=weight.device)
    factor = torch.linalg.cholesky(moments.reads + held)
    return torch.cholesky_solve((weight @ (moments.exact + held)).t(), factor).t().contiguous()


def rounded(
    weight: Tensor,
    moments: Moments,
    group: int | None,
    scales: Callable[[Tensor], tuple[Tensor, Tensor]],
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight on its grid, rounded input by input with error feedback.

    Args:
        weight: ``[out_features, in_features]``, float32.
        moments: of its inputs.
        group: inputs that share a scale; None for all.
        scales: from the columns of a group to their scale and zero point, each ``[out_features, 1]``.
        low: the least code.
        high: the greatest.

    Returns:
        The values, and scales and zero points ``[out_features, groups]``.
    """
    left, values = weight.clone(), torch.empty_like(weight)
    spread = moments.spread
    width, found = weight.shape[1], []
    if group is None:
        found.append(scales(left))
    for start in range(0, width, group or _BLOCK):
        end = min(start + (group or _BLOCK), width)
        if group is not None:
            found.append(scales(left[:, start:end]))
        scale, zero = (part[:, 0].float() for part in found[-1])
        columns, errors = left[:, start:end].clone(), left.new_empty(len(weight), end - start)
        for index, at in enumerate(range(start, end)):
            column = columns[:, index]
            values[:, at] = ((column / scale + zero).round().clamp(low, high) - zero) * scale
            errors[:, index] = (column - values[:, at]) / spread[at, at]
            columns[:, index + 1 :] -= torch.outer(errors[:, index], spread[at, at + 1 : end])
        left[:, end:] -= errors @ spread[start:end, end:]
    return values, torch.cat([scale for scale, _ in found], 1), torch.cat([zero for _, zero in found], 1)
