# SPDX-License-Identifier: Apache-2.0
"""Which tokens an adapter leaves dense, for as long as a layer of the model has the adapter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from spon_peft.config import SponConfig
from spon_plugin.decoder.tokens import Attachment, DenseTokens, dense_tokens


class AdapterTokens(DenseTokens):
    """The `DenseTokens` of one adapter in one model, shared by the adapter's layers.

    It hangs on the base model, so it works alike under `PeftModel` and where layers were injected without one.

    Attributes:
        layers: how many layers refer to it; the last one to leave detaches it.
    """

    def __init__(self, config: SponConfig, model: nn.Module) -> None:
        super().__init__(config.dense_prefix, config.tokens)  # type: ignore[arg-type]
        self.layers = 0
        self._attachment: Attachment | None = None
        # The two sequences of an encoder-decoder have positions of their own: all their tokens are masked.
        encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.leaves_any_dense = (self.dense_prefix > 0 or self.tokens != "all") and not encoder_decoder
        if self.leaves_any_dense:
            self._attachment = self.attach(model)

    def of_example(self, inputs: dict[str, Any], labels: Tensor) -> Tensor | None:
        """The tokens of a whole example that would be dense if its labelled tokens were generated one by one.

        Args:
            inputs: of the model's forward, without labels.
            labels: ``[batch, sequence]``; -100 marks the context.

        Returns:
            bool ``[batch, sequence]``, True for dense; None where all tokens are masked.
        """
        if self.tokens == "all" or not self.leaves_any_dense:
            return self.of_inputs(**inputs) if self.leaves_any_dense else None
        mask = inputs.get("attention_mask")
        shape = (labels.shape[0], labels.shape[1])
        prefix = dense_tokens(shape, self.dense_prefix, attention_mask=mask, device=labels.device)
        context = labels == -100
        return context if prefix is None else context | prefix

    def detach(self) -> None:
        """Take the hooks off the model."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
