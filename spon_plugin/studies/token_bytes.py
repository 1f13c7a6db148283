# SPDX-License-Identifier: Apache-2.0
"""How many bytes of a model one generated token reads: codes, scales, head, norms, thresholds and biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from spon_plugin.adapter.mask import Mask
from spon_plugin.decoder.sites import Site
from spon_plugin.weights import linear_features, weight_of
from spon_plugin.weights.row_weight import RowWeight
from spon_plugin.weights.scaled import ScaledWeight


@dataclass(frozen=True)
class TokenBytes:
    """What a token reads of a model as it is stored.

    Attributes:
        codes: path of each linear that can skip rows -> bytes of all its rows, scales apart.
        rest: bytes of all else: scales, output head, norms, biases. Embeddings do not count, of which a token reads one
            row, unless they are the head.
        weights: how many numbers codes and rest stand for, scales apart.
        unbiased: path of each of the linears that has no bias -> bytes of the one that an alpha would give it.
        sites: the linears of one input, which share a mask, or a centre alone.
    """

    codes: Mapping[str, int]
    rest: int
    weights: int
    unbiased: Mapping[str, int] = field(default_factory=dict)
    sites: Sequence[tuple[str, ...]] = ()

    def read(self, dropped: Mapping[str, float] | None = None, masks: Mapping[str, Mask] | None = None) -> float:
        """Bytes that a token reads on average.

        Scales are read as a whole, though groups without a kept row could be left out.

        Args:
            dropped: path -> share of its rows that are skipped.
            masks: path -> threshold, and centre and alpha, which become biases.
        """
        dropped, masks = dropped or {}, masks or {}
        total = self.rest + sum(size * (1 - dropped.get(path, 0.0)) for path, size in self.codes.items())
        for site in self.sites:
            own = [masks[path] for path in site if path in masks]
            for vectors in ([mask.threshold for mask in own], [mask.center for mask in own]):
                total += sum(4 * vector.numel() for vector in _distinct(vectors))
        return total + sum(
            size for path, size in self.unbiased.items() if path in masks and masks[path].constant is not None
        )

    def bits(self, read: float) -> float:
        """Bits per weight, where a token reads so many bytes."""
        return 8 * read / self.weights


@dataclass(frozen=True)
class Stored:
    """A model to be scored, and what a token reads of it as it is stored.

    Attributes:
        model: in floating point, with the values of the stored one.
        bytes: of the stored one.
    """

    model: Any
    bytes: TokenBytes


def stored_bytes(model: Any, sites: Sequence[Site]) -> TokenBytes:
    """What a token reads of a model in memory.

    Args:
        model: a causal language model of transformers, packed or not.
        sites: from `find_sites`; their linears can skip rows.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    masked = {path for site in sites for path in site.modules}
    codes: dict[str, int] = {}
    unbiased: dict[str, int] = {}
    rest = weights = 0
    counted: set[int] = set()
    for path, module in model.named_modules():
        bias: Tensor | None = getattr(module, "bias", None)
        rows = _rows(module, path in masked or module is head)
        if rows is not None:
            size = rows.in_features * rows.row_bytes
            if path in masked:
                codes[path] = size
            rest += _scale_bytes(rows) + (0 if path in masked else size)
            weights += rows.in_features * rows.out_features
            if bias is None and path in masked:
                unbiased[path] = model.dtype.itemsize * linear_features(module)[1]
            own = [bias] if bias is not None else []
        else:
            own = [] if module is embeddings else list(module.parameters(recurse=False))
        for tensor in own:
            if id(tensor) not in counted:
                counted.add(id(tensor))
                rest += tensor.numel() * tensor.element_size()
                weights += tensor.numel()
    return TokenBytes(codes, rest, weights, unbiased, [site.modules for site in sites])


def _distinct(vectors: Sequence[Tensor | None]) -> list[Tensor]:
    """Those that differ in value: linears that share one read it once."""
    return list({v.detach().cpu().numpy().tobytes(): v for v in vectors if v is not None}.values())


def _rows(module: nn.Module, is_linear: bool) -> RowWeight | None:
    if not is_linear:
        return None
    found = getattr(module, "row_weight", None) or weight_of(module)
    return found if isinstance(found, RowWeight) else None


def _scale_bytes(rows: RowWeight) -> int:
    if not isinstance(rows, ScaledWeight):
        return 0
    parts = (rows.scales, rows.zeros, rows.offsets, rows.group_of_row)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)
