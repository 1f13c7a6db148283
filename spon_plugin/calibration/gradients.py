# SPDX-License-Identifier: Apache-2.0
"""Show what linears read, and how the output feels it, to someone: gradients of the model's own log-likelihood."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spon_plugin.calibration.streaming import window_batches
from spon_plugin.progress import Progress, no_progress

ObserveGradient = Callable[[Tensor, Tensor], None]
"""Called with a linear's input ``[1, length, in_features]`` and the gradient of ``-sum_t log p(y_t)`` by it."""


def stream_gradients(
    model: nn.Module,
    observers: Mapping[str, ObserveGradient],
    windows: Tensor,
    seed: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Run the dense model forward and backward, `y` drawn from the model itself: the Fisher information's gradients.

    Args:
        model: a dense decoder that maps ``input_ids=`` to an object with ``logits``.
        observers: module path -> what sees its input and the gradient by it. Linears that read one tensor each have a
            gradient of their own.
        windows: token ids ``[count, length]``, one a pass.
        seed: of the sampled tokens.
        progress: called after each window.
    """
    handles: list[Any] = []

    def watch(observe: ObserveGradient) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            read = args[0].detach()
            own = args[0].view_as(args[0])  # the linears of a site read one tensor; each has its own gradient here
            own.register_hook(lambda gradient: observe(read, gradient))
            return (own, *args[1:])

        return hook

    def differentiable(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.requires_grad_()

    asked: Sequence[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    try:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                handles.append(module.register_forward_hook(differentiable))
        for path, observe in observers.items():
            handles.append(model.get_submodule(path).register_forward_pre_hook(watch(observe)))
        for parameter in asked:
            parameter.requires_grad_(False)
        for done, batch in window_batches(windows, 1):
            with torch.enable_grad():
                logits = model(input_ids=batch.to(device), use_cache=False).logits.flatten(0, 1).float()  # type: ignore[operator]
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(-1)
                F.cross_entropy(logits, drawn, reduction="sum").backward()
            progress(done, len(windows))
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
