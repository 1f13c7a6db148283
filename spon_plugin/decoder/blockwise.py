# SPDX-License-Identifier: Apache-2.0
"""Run a decoder block by block on states that are kept, so that one block can be changed before the next one runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.decoder.head import run_backbone
from spon_plugin.decoder.positions import whole_windows
from spon_plugin.decoder.sites import decoder_blocks


class Blockwise:
    """The blocks of a decoder, and what the model hands to them on some windows.

    Args:
        model: a decoder whose blocks take the states first and give them first.
        windows: token ids ``[count, length]``.
        batch_size: windows per pass.

    Attributes:
        blocks: path and block, in order.
        first: the states before the first block, ``[batch, length, hidden]`` for each batch.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, windows: Tensor, batch_size: int = 8) -> None:
        self.blocks = decoder_blocks(model)
        self.first: list[Tensor] = []
        self._rest: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in self.blocks]
        device = next(model.parameters()).device
        handles = [
            block.register_forward_pre_hook(self._keep(index), with_kwargs=True)
            for index, (_, block) in enumerate(self.blocks)
        ]
        try:
            with whole_windows():
                for batch in windows.split(batch_size):
                    run_backbone(model, batch.to(device), [block for _, block in self.blocks])
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            self._rest[index].append((args[1:], others))
            if index == 0:
                self.first.append(args[0] if args else kwargs["hidden_states"])

        return hook

    @torch.no_grad()
    def run(self, index: int, batch: int, states: Tensor) -> Tensor:
        """The states after a block.

        Args:
            index: of the block.
            batch: of the windows.
            states: before it.
        """
        args, kwargs = self._rest[index][batch]
        with whole_windows():
            output = self.blocks[index][1](states, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output
