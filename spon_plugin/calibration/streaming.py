# SPDX-License-Identifier: Apache-2.0
"""Show the rows of linears' inputs to someone, batch by batch, while the dense model reads some text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.decoder.head import run_backbone
from spon_plugin.errors import SponError
from spon_plugin.progress import Progress, no_progress

Observe = Callable[[Tensor, Tensor | None], None]
"""Called with an input ``[..., in_features]`` and which of its tokens are special, bool ``[...]`` or None for none."""


SINKS = 1
"""Positions at the start of a window that statistics leave out: attention sinks, whose activations are hundreds of
times as large as others' and would be all that a mean or a norm shows. Masks treat them as any other."""


def counted_rows(x: Tensor, special: Tensor | None) -> Tensor:
    """The rows ``[tokens, in_features]`` of the tokens that are not special."""
    return x.flatten(0, -2) if special is None else x[~special]


def first_positions(x: Tensor, shape: torch.Size, count: int) -> Tensor | None:
    """Which rows of `x` are at the first `count` positions of windows that are read in one pass.

    Args:
        x: ``[..., features]``, of a module inside the model.
        shape: ``(windows, length)``.
        count: of positions.

    Returns:
        Bool ``[...]``; None for none, as of an input that has other tokens.
    """
    if not count or x.shape[:-1].numel() != shape.numel():
        return None
    first = torch.arange(shape[1], device=x.device) < count
    return first.expand(shape).reshape(x.shape[:-1])


@torch.no_grad()
def stream_inputs(
    model: nn.Module,
    observers: Mapping[str, Observe],
    windows: Tensor,
    skip: int = SINKS,
    batch_size: int = 4,
    progress: Progress = no_progress,
    outputs: Mapping[str, Observe] | None = None,
) -> None:
    """Run the dense model and show every observer the inputs of its linear.

    Args:
        model: a dense decoder.
        observers: module path -> what sees its input.
        windows: token ids, int64 ``[count, length]``, without padding.
        skip: positions at the start of each window that are special.
        batch_size: windows per forward pass.
        progress: called after each pass.
        outputs: module path -> what sees its output, likewise.

    Raises:
        SponError: there are no windows, or none has a position after the skipped ones.
    """
    check_windows(windows, skip)
    handles: list[Any] = []
    shape = windows[:batch_size].shape

    def on_input(observe: Observe) -> Any:
        return lambda _module, args: observe(args[0], first_positions(args[0], shape, skip))

    def on_output(observe: Observe) -> Any:
        return lambda _module, _args, y: observe(y, first_positions(y, shape, skip))

    for path, observe in observers.items():
        handles.append(model.get_submodule(path).register_forward_pre_hook(on_input(observe)))
    for path, observe in (outputs or {}).items():
        handles.append(model.get_submodule(path).register_forward_hook(on_output(observe)))
    try:
        device = next(model.parameters()).device
        seen = [model.get_submodule(path) for path in (*observers, *(outputs or {}))]
        for done, batch in window_batches(windows, batch_size):
            shape = batch.shape
            run_backbone(model, batch.to(device), seen)
            progress(done, len(windows))
    finally:
        for handle in handles:
            handle.remove()


def check_windows(windows: Tensor, skip: int) -> None:
    """Raise `SponError` if there are no windows ``[count, length]``, or none has a position after the skipped ones."""
    if windows.numel() == 0 or windows.shape[1] <= skip:
        raise SponError.of(
            "calibration windows", tuple(windows.shape), f"at least one window of more than {skip} tokens"
        )


def window_batches(windows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Batches of windows ``[<= size, length]``, each with the number of windows done after it."""
    for start in range(0, len(windows), size):
        batch = windows[start : start + size]
        yield start + len(batch), batch
