# SPDX-License-Identifier: Apache-2.0
"""Round a model's linears for the inputs that they get, by error feedback, block by block, under an adapter's masks.

What `spon_plugin.weights.error_feedback` does to a linear, done to a decoder: two streams of states go through its
blocks, the dense model's and that of the model as it will run, masked and rounded so far. On the second each linear is
made to give what it gives on the first. The checkpoint is an ordinary one of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.adapter.mask import Mask
from spon_plugin.decoder.blockwise import Blockwise
from spon_plugin.decoder.masked_linears import sparse_inputs
from spon_plugin.decoder.sites import Site, find_sites
from spon_plugin.machine import is_native
from spon_plugin.progress import Progress, no_progress
from spon_plugin.weights.error_feedback import RIDGE, Moments, check_ridge, fitted, rounded
from spon_transformers.quantize import Rounding, least_error, linears_to_round, pack, round_linear, scheme_of


class _Seen(Exception):
    """The linears of a site have been reached: the rest of the block need not run."""


@torch.no_grad()
def quantize_for_inputs(
    model: Any,
    rounding: Rounding,
    windows: Tensor,
    adapter: Adapter | None = None,
    ridge: float = RIDGE,
    progress: Progress = no_progress,
) -> list[str]:
    """`quantize`, each linear rounded for the inputs that it gets on some text.

    Args:
        model: a dense `PreTrainedModel` with floating-point weights; rounded in place.
        rounding: see `Rounding`; the head is rounded to the nearest.
        windows: token ids ``[count, length]``; some ten thousand tokens.
        adapter: under whose masks and alphas the model will run; it goes on running without it. None for no masks.
        ridge: see `error_feedback.fitted`.
        progress: called with (linears done, linears).

    Returns:
        The paths of the rounded linears.

    Raises:
        SponError: as `quantize`, the ridge is out of its range, or the adapter does not fit the model. Nothing has
            been changed then.
    """
    check_ridge(ridge)
    masks: Mapping[str, Mask] = {}
    if adapter is not None:
        adapter.check_masks_alone("rounding for its masks")
        masks = adapter.masks
    prefix = 0 if adapter is None else adapter.fields.dense_prefix
    with sparse_inputs(model, masks, prefix):  # it checks that the masks fit
        pass
    linears = linears_to_round(model, rounding)
    names = list(linears)
    with _computing(model) as stored:
        solver = _Solver(model, masks, prefix, rounding, ridge, stored, linears)
        for done in solver.run(windows):
            progress(done, len(names))
    return names


@dataclass
class _Solver:
    """The state of one run.

    Attributes:
        model: that is rounded.
        masks: that it runs under, by module path.
        prefix: positions that these leave dense.
        rounding: how.
        ridge: of the fits.
        stored: the dtype that weights and scales are kept in.
        left: path -> linear that is still to be rounded.
    """

    model: Any
    masks: Mapping[str, Mask]
    prefix: int
    rounding: Rounding
    ridge: float
    stored: torch.dtype
    left: dict[str, nn.Linear]

    def __post_init__(self) -> None:
        """What the grid is."""
        from compressed_tensors.quantization.utils import calculate_range

        self.scheme = scheme_of(self.rounding)
        low, high = calculate_range(self.scheme.weights, "cpu")
        self.low, self.high = float(low), float(high)

    def run(self, windows: Tensor) -> Iterator[int]:
        """Round everything, block after block; gives the number of linears that are done."""
        total, sites = len(self.left), find_sites(self.model)
        blocks = Blockwise(self.model, windows)
        dense = sparse = blocks.first
        for index, (path, _) in enumerate(blocks.blocks):
            mine = [site for site in sites if site.block == path]
            own = {name: mask for name, mask in self.masks.items() if name.startswith(f"{path}.")}
            exact: dict[str, list[Tensor]] = {site.modules[0]: [] for site in mine}
            with _inputs(self.model, exact):
                dense = [blocks.run(index, batch, states) for batch, states in enumerate(dense)]
            grids: dict[str, tuple[Tensor, Tensor]] = {}
            for site in mine:
                moments = self._moments(blocks, index, site, sparse, exact.pop(site.modules[0]), own)
                for name in site.modules:
                    grids[name] = self._round(name, moments[name])
                    yield total - len(self.left)
            with sparse_inputs(self.model, own, self.prefix):
                sparse = [blocks.run(index, batch, states) for batch, states in enumerate(sparse)]
            for name, grid in grids.items():  # packed linears do not run
                module = self.model.get_submodule(name)
                module.weight.data = module.weight.data.to(self.stored)
                pack(module, self.scheme, *grid)
        for linear in self.left.values():  # the head
            linear.weight.data = linear.weight.data.to(self.stored)
            round_linear(linear, self.rounding)
            yield total

    def _round(self, name: str, moments: Moments) -> tuple[Tensor, Tensor]:
        """Give a linear its values, and say on which grid they are."""
        linear = self.left.pop(name)
        weight = fitted(linear.weight.float(), moments, self.ridge)

        def scales(columns: Tensor) -> tuple[Tensor, Tensor]:
            return least_error(columns.contiguous(), None, self.scheme.weights, self.stored)

        values, scale, zero = rounded(weight, moments, self.rounding.group, scales, self.low, self.high)
        linear.weight.copy_(values)
        return scale, zero

    def _moments(
        self,
        blocks: Blockwise,
        index: int,
        site: Site,
        sparse: Sequence[Tensor],
        exact: Sequence[Tensor],
        masks: Mapping[str, Mask],
    ) -> dict[str, Moments]:
        """Of the inputs of a site's linears; one for those that have equal masks."""
        leads: dict[str, str] = {}
        for name in site.modules:
            leads[name] = next((other for other in leads.values() if _equal(masks, name, other)), name)
        found = {lead: Moments(site.in_features, self.model.device) for lead in dict.fromkeys(leads.values())}
        reads: dict[str, list[Tensor]] = {name: [] for name in site.modules}
        with sparse_inputs(self.model, masks, self.prefix), _inputs(self.model, reads, until=site.modules[-1]):
            for batch, states in enumerate(sparse):
                with suppress(_Seen):
                    blocks.run(index, batch, states)
                for lead, moments in found.items():
                    read = reads[lead][-1]
                    constant = masks[lead].constant if lead in masks else None
                    if constant is not None:  # what the folded bias multiplies
                        read = read + constant.to(read)
                    moments.add(read.flatten(0, -2), exact[batch].flatten(0, -2))
                for each in reads.values():
                    each.clear()
        return {name: found[lead] for name, lead in leads.items()}


@contextmanager
def _computing(model: Any) -> Iterator[torch.dtype]:
    """While the block runs, the model is in float32 on a CPU that emulates its dtype, which is yielded."""
    stored: torch.dtype = model.dtype
    if is_native(stored, model.device):
        yield stored
        return
    cast = [each for each in (*model.parameters(), *model.buffers()) if each.dtype == stored]
    try:
        for each in cast:
            each.data = each.data.float()
        yield stored
    finally:
        for each in cast:
            each.data = each.data.to(stored)


def _equal(masks: Mapping[str, Mask], one: str, other: str) -> bool:
    if one not in masks or other not in masks:
        return (one in masks) == (other in masks)
    first, second = masks[one].tensors(), masks[other].tensors()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@contextmanager
def _inputs(model: nn.Module, kept: Mapping[str, list[Tensor]], until: str | None = None) -> Iterator[None]:
    """While the block runs, what linears read is put into `kept` by their paths, and the pass ends at `until`."""

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            kept[path].append(args[0])
            if path == until:
                raise _Seen

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(keep(path)) for path in kept]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
