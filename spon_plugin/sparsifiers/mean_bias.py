# SPDX-License-Identifier: Apache-2.0
"""The control of every table: a bias that is measured rather than trained, ``E[W x - method(x)]``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spon_plugin.calibration.streaming import Observe, counted_rows, stream_inputs
from spon_plugin.decoder.sites import Site
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Fitted
from spon_plugin.weights import weight_of
from spon_plugin.weights.linears import is_conv1d


@torch.no_grad()
def mean_biases(
    model: nn.Module, fitted: Fitted, windows: Tensor, batch_size: int = 4, progress: Progress = no_progress
) -> dict[str, Tensor]:
    """What each linear's output misses on average, over dense activations.

    For input masks this is ``W E[x - S(x)]``, the `calibration.measurement.mean_alphas`; as a bias it also exists for
    methods that change the weight or add a remainder, because all of them are linear in ``x`` and ``S(x)``.

    Args:
        model: the dense decoder.
        fitted: the method.
        windows: token ids ``[count, length]``.
        batch_size: windows per forward pass.
        progress: called after each pass.

    Returns:
        Module path -> float32 ``[out_features]``, for `Fitted.attach`.
    """
    sums: dict[str, list[Tensor]] = {}
    rows: dict[str, int] = {}

    def observe(site: Site) -> Observe:
        def update(x: Tensor, special: Tensor | None) -> None:
            kept = fitted.sparse_input(site, x)[0]
            pair = [counted_rows(part, special).float().sum(0) for part in (x, kept)]
            before = sums.get(site.name) or [torch.zeros_like(part) for part in pair]
            sums[site.name] = [a + b for a, b in zip(before, pair, strict=True)]
            rows[site.name] = rows.get(site.name, 0) + counted_rows(x, special).shape[0]

        return update

    watched = {path: fitted.site_of[path] for path in fitted.modules}
    first = {next(path for path in site.modules if path in watched): site for site in set(watched.values())}
    with fitted.watching(model):
        observers = {path: observe(site) for path, site in first.items()}
        stream_inputs(model, observers, windows, fitted.skip, batch_size, progress)
    biases = {}
    for path, site in watched.items():
        module: Any = model.get_submodule(path)
        whole, kept = (total / rows[site.name] for total in sums[site.name])
        center = fitted.centers.get(path)
        through = kept if center is None else kept + center.to(kept.device)
        replaced = fitted.weight(path, module.weight)
        if replaced is None:
            missing = weight_of(module).product(whole - through)
        else:
            pruned = replaced.float().t() if is_conv1d(module) else replaced.float()
            missing = weight_of(module).product(whole) - F.linear(through, pruned)
        rest = fitted.remainder(path, whole - kept) if center is None else None
        biases[path] = missing if rest is None else missing - rest
    return biases
