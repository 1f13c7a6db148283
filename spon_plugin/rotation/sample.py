# SPDX-License-Identifier: Apache-2.0
"""What a rotation is chosen from: inputs of the sites on the residual stream, and how the output feels them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spon_plugin.calibration.gradients import ObserveGradient, stream_gradients
from spon_plugin.calibration.sensitivity import RowSample
from spon_plugin.calibration.streaming import SINKS, check_windows, counted_rows, first_positions
from spon_plugin.decoder.sites import Site
from spon_plugin.machine import is_native
from spon_plugin.progress import Progress, no_progress
from spon_plugin.rotation.cost import StreamInputs

ROWS = 16384
"""Inputs of each site that are kept, in float32. A rotation has as many freedoms as a weight: chosen on a
thousand it fits what these have in common by chance, and hardly helps on others."""


def sample_inputs(
    model: nn.Module,
    sites: Sequence[Site],
    windows: Tensor,
    seed: int = 0,
    rows: int = ROWS,
    progress: Progress = no_progress,
) -> list[StreamInputs]:
    """Read some text forward and backward; the first position of a window, an attention sink, is left out.

    Args:
        model: a dense decoder, its norms' gains folded.
        sites: of `stream.ResidualStream`.
        windows: token ids ``[count, length]``.
        seed: of the tokens that are drawn from the model's distribution.
        rows: to keep of each site.
        progress: called after each window.

    Returns:
        For each site; ``hidden ** 2`` numbers, and `rows` times `hidden`, where the model is.

    Raises:
        SponError: there are no windows, or none has a position after the first.
    """
    check_windows(windows, SINKS)
    shape = windows[:1].shape
    device = next(model.parameters()).device
    kept = [RowSample.of(windows, SINKS, rows) for _ in sites]
    moments = [torch.zeros(site.in_features, site.in_features, device=device) for site in sites]

    def watch(index: int, path: str) -> ObserveGradient:
        def observe(x: Tensor, gradient: Tensor) -> None:
            special = first_positions(x, shape, SINKS)
            felt = counted_rows(gradient, special).float()
            moments[index] += felt.t() @ felt
            if path == sites[index].modules[0]:
                kept[index].update(counted_rows(x, special))

        return observe

    observers = {path: watch(index, path) for index, site in enumerate(sites) for path in site.modules}
    with torch.autocast(device.type, torch.bfloat16, enabled=is_native(torch.bfloat16, device)):
        stream_gradients(model, observers, windows, seed, progress)
    tokens = windows[:, SINKS:].numel()
    return [
        StreamInputs(sample.rows, moment / tokens, site.weights // site.in_features)
        for sample, moment, site in zip(kept, moments, sites, strict=True)
    ]
