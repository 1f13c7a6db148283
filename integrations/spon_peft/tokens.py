# SPDX-License-Identifier: Apache-2.0
"""Which tokens an adapter leaves dense, for as long as a layer of the model has the adapter."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from spon_peft.config import SponConfig
from spon_plugin.decoder.tokens import Attachment, DenseTokens, rule_of


class AdapterTokens(DenseTokens):
    """The `DenseTokens` of one adapter in one model, shared by the adapter's layers.

    It follows the blocks of the base model, so it works alike under `PeftModel`, where layers were injected without
    one, and where the backbone is called by itself.

    Attributes:
        layers: how many layers refer to it; the last one to leave detaches it.
    """

    def __init__(self, rule: DenseTokens, model: nn.Module, paths: Iterable[str]) -> None:
        super().__init__(rule.dense_prefix, rule.tokens)
        self.layers = 0
        self._attachment: Attachment | None = self.attach(model, paths)

    @classmethod
    def of(cls, config: SponConfig, model: nn.Module, paths: Iterable[str]) -> AdapterTokens | None:
        """What follows `model` for an adapter on the linears at `paths`; None for one that masks every token.

        Raises:
            SponError: the adapter leaves tokens dense by their position, and the model tells its blocks none.
        """
        rule, paths = rule_of(config, model), list(paths)
        rule.check(model, paths)
        return cls(rule, model, paths) if rule.leaves_any else None

    def detach(self) -> None:
        """Take the hooks off the model."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
