# SPDX-License-Identifier: Apache-2.0
"""Show the rows of linears' inputs to someone, batch by batch, while the dense model reads some text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.decoder.tokens import DenseTokens
from spon_plugin.errors import SponError
from spon_plugin.progress import Progress, no_progress

Observe = Callable[[Tensor, Tensor | None], None]
"""Called with an input ``[..., in_features]`` and which of its tokens are special, bool ``[...]`` or None for none."""


def counted_rows(x: Tensor, special: Tensor | None) -> Tensor:
    """The rows ``[tokens, in_features]`` of the tokens that are not special."""
    return x.flatten(0, -2) if special is None else x[~special]


@torch.no_grad()
def stream_inputs(
    model: nn.Module,
    observers: Mapping[str, Observe],
    windows: Tensor,
    dense_prefix: int = 1,
    batch_size: int = 4,
    progress: Progress = no_progress,
    outputs: Mapping[str, Observe] | None = None,
) -> None:
    """Run the dense model and show every observer the inputs of its linear.

    Args:
        model: a dense decoder.
        observers: module path -> what sees its input.
        windows: token ids, int64 ``[count, length]``, without padding.
        dense_prefix: positions at the start of each window that are special (attention sinks).
        batch_size: windows per forward pass.
        progress: called after each pass.
        outputs: module path -> what sees its output, likewise.

    Raises:
        SponError: there are no windows, or none has a position after the prefix.
    """
    check_windows(windows, dense_prefix)
    tokens = DenseTokens(dense_prefix)
    handles: list[Any] = [tokens.attach(model)]

    def on_input(observe: Observe) -> Any:
        return lambda _module, args: observe(args[0], tokens.rows(args[0]))

    def on_output(observe: Observe) -> Any:
        return lambda _module, _args, y: observe(y, tokens.rows(y))

    for path, observe in observers.items():
        handles.append(model.get_submodule(path).register_forward_pre_hook(on_input(observe)))
    for path, observe in (outputs or {}).items():
        handles.append(model.get_submodule(path).register_forward_hook(on_output(observe)))
    try:
        device = next(model.parameters()).device
        for done, batch in window_batches(windows, batch_size):
            model(input_ids=batch.to(device))
            progress(done, len(windows))
    finally:
        for handle in handles:
            handle.remove()


def check_windows(windows: Tensor, dense_prefix: int) -> None:
    """Raise `SponError` if there are no windows ``[count, length]``, or none has a position after the prefix."""
    if windows.numel() == 0 or windows.shape[1] <= dense_prefix:
        raise SponError.of(
            "calibration windows", tuple(windows.shape), f"at least one window of more than {dense_prefix} tokens"
        )


def window_batches(windows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Batches of windows ``[<= size, length]``, each with the number of windows done after it."""
    for start in range(0, len(windows), size):
        batch = windows[start : start + size]
        yield start + len(batch), batch
