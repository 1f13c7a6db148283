# SPDX-License-Identifier: Apache-2.0
"""Weights with scales in a layer of vLLM's, as our kernels read them: its parameters, and what they replace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spon_plugin.errors import SponError
from spon_plugin.kernels.table import Problem, choose
from spon_plugin.weights.scaled import ScaledWeight

PARTS = ("codes", "scales", "zeros", "group_of_row")


class Layout(NamedTuple):
    """What of a weight is no tensor, or decides which tensors there are.

    Attributes:
        format: see `RowWeight`.
        group_size: see `ScaledWeight`.
        parts: the names of the tensors that are there.
    """

    format: str
    group_size: int
    parts: tuple[str, ...]

    @staticmethod
    def of(weight: ScaledWeight) -> Layout:
        """That of `weight`."""
        parts = tuple(name for name in PARTS if getattr(weight, name) is not None)
        return Layout(weight.format, weight.group_size, parts)


def in_layout(weight: ScaledWeight, layout: Layout, path: str) -> ScaledWeight:
    """`weight` with the tensors that an earlier one in its place had, as graphs hold those.

    Args:
        weight: loaded again.
        layout: of the earlier one.
        path: of a linear in the layer, for the error.

    Raises:
        SponError: it has zero points or an order of groups that the earlier one had not.
    """
    new = Layout.of(weight)
    more = sorted(set(new.parts) - set(layout.parts))
    if more or new.format != layout.format:
        raise SponError.of(
            path, f"{new.format} with {', '.join(new.parts)}", f"{layout.format} with {', '.join(layout.parts)}",
            "Weights of another kind were loaded again; start the server anew with them.",
        )  # fmt: skip
    if "zeros" in layout.parts and weight.zeros is None:
        kind = torch.uint8 if weight.format == "int4" else torch.int16
        weight = replace(weight, zeros=torch.full_like(weight.scales, weight.middle, dtype=kind))
    if "group_of_row" in layout.parts and weight.group_of_row is None:
        weight = replace(weight, group_of_row=weight.groups.to(torch.int32))
    return weight


def hold(layer: Any, weight: ScaledWeight) -> None:
    """Put a weight's tensors into a layer.

    They are parameters, as what vLLM copies into the served ones when weights are loaded again.

    Args:
        layer: of vLLM's.
        weight: arranged.
    """
    for name in PARTS:
        part = getattr(weight, name)
        own = None if part is None else nn.Parameter(part, requires_grad=False)
        layer.register_parameter(f"spon_{name}", own)


def release(layer: Any) -> None:
    """Free what a checkpoint's loader has filled: the weight's rows are held elsewhere.

    The parameters stay, empty: they are how weights are loaded again, and how LoRA finds a layer's device. Two numbers
    of compressed-tensors stay as they are: vLLM brings them once for each linear, the last ones after it has finished.
    """
    for name, parameter in layer.named_parameters(recurse=False):
        if name not in ("bias", "weight_shape") and not name.startswith("spon_"):
            parameter.data = parameter.data.new_empty(0)


def held_bytes(layer: Any) -> int:
    """What the tensors of `hold` take."""
    parts = (getattr(layer, f"spon_{name}") for name in PARTS)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def kernel_of(weight: ScaledWeight, dtype: torch.dtype) -> str:
    """The name of the kernel that a decoding step of one token runs."""
    row: Tensor = torch.empty((1, weight.in_features), dtype=dtype, device=weight.codes.device)
    return choose(Problem(row, weight)).name
