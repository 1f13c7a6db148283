# SPDX-License-Identifier: Apache-2.0
"""How a target sparsity becomes masks: the same share at every site, or shared out greedily within each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.adapter.mask import Mask
from spon_plugin.calibration.histogram import MagnitudeHistogram
from spon_plugin.calibration.streaming import SINKS
from spon_plugin.decoder.masked_linears import sparse_inputs
from spon_plugin.decoder.positions import whole_windows
from spon_plugin.decoder.sites import Site
from spon_plugin.masking import check_sparsity
from spon_plugin.progress import Progress, no_progress

MAX_SITE_SPARSITY = 0.99


def masks_at(
    sites: Sequence[Site], histograms: Mapping[str, MagnitudeHistogram], sparsity: float | Mapping[str, float]
) -> dict[str, Mask]:
    """The masks that zero a share `sparsity` of each site's input, by one threshold for the linears of a site.

    Args:
        sites: from `find_sites`.
        histograms: site name -> magnitudes of the site's input.
        sparsity: one share for all sites (TEAL's ``uniform``), or site name -> share.

    Returns:
        Module path -> mask, with a threshold ``[1]``.

    Raises:
        SponError: a share lies outside [0, 1).
    """
    masks = {}
    for site in sites:
        share = sparsity[site.name] if isinstance(sparsity, Mapping) else sparsity
        value = histograms[site.name].quantile(check_sparsity(share))
        for path in site.modules:
            masks[path] = Mask(torch.tensor([value], dtype=torch.float32))
    return masks


@torch.no_grad()
def allocate_greedy(
    model: nn.Module,
    sites: Sequence[Site],
    histograms: Mapping[str, MagnitudeHistogram],
    windows: Tensor,
    sparsity: float,
    step: float = 0.05,
    dense_prefix: int = 0,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """TEAL's ``greedy`` (arXiv 2408.14690, algorithm 1): spend sparsity where a block feels it least.

    In every block, one site's sparsity is raised at a time: the one whose increase hurts least, measured as the L2
    distance between the block's masked and dense output on dense inputs, without `SINKS`. Increases are weighted by the
    site's weights, so each costs the same number of weights and every block ends at the target exactly; then so does
    the model.

    Args:
        model: a dense decoder.
        sites: from `find_sites`.
        histograms: site name -> magnitudes of the site's input.
        windows: token ids ``[count, length]``; one batch.
        sparsity: the target of every block, in [0, 1).
        step: increase of the block's sparsity per move. TEAL uses 0.05.
        dense_prefix: positions at the start of each window that stay dense.
        progress: called after each block.

    Returns:
        Site name -> share, for `masks_at`.

    Raises:
        SponError: the target lies outside [0, 1).
    """
    check_sparsity(sparsity)
    by_block: dict[str, list[Site]] = {}
    for site in sites:
        by_block.setdefault(site.block, []).append(site)
    calls = _record_calls(model, list(by_block), windows)
    shares: dict[str, float] = {}
    for done, (path, group) in enumerate(by_block.items(), start=1):
        block = model.get_submodule(path)
        args, kwargs, target = calls.pop(path)

        def error(trial: dict[str, float], group: list[Site] = group, block: nn.Module = block) -> float:
            masks = masks_at(group, histograms, trial)
            with sparse_inputs(model, masks, dense_prefix), whole_windows():
                out = _first(block(*args, **kwargs))  # noqa: B023 (called within this turn of the loop)
            return float((out - target)[:, SINKS:].float().norm())  # noqa: B023

        shares.update(_descend(group, sparsity, step, error))
        progress(done, len(by_block))
    return shares


def _descend(group: Sequence[Site], sparsity: float, step: float, error: Any) -> dict[str, float]:
    """Raise one site's share at a time until the weighted mean is `sparsity`."""
    total = sum(site.weights for site in group)
    shares = {site.name: 0.0 for site in group}
    reached = 0.0
    while sparsity - reached > 1e-9:
        move = min(step, sparsity - reached)
        trials = []
        for site in group:
            raised = shares[site.name] + move * total / site.weights
            if raised <= MAX_SITE_SPARSITY:
                trials.append((error({**shares, site.name: raised}), site.name, raised))
        if not trials:  # every site but a fraction of a step is full: fill evenly
            return {name: sparsity for name in shares}
        _, name, raised = min(trials)
        shares[name] = raised
        reached += move
    return shares


def _record_calls(
    model: nn.Module, paths: Sequence[str], windows: Tensor
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """Arguments and output of each block in one dense pass over `windows`."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def record(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[path] = (args, kwargs, _first(output))

        return hook

    handles = [model.get_submodule(p).register_forward_hook(record(p), with_kwargs=True) for p in paths]
    try:
        model(input_ids=windows.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _first(output: Any) -> Tensor:
    """A block's hidden states: some blocks return a tuple."""
    return output[0] if isinstance(output, tuple) else output
