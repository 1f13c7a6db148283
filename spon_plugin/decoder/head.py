# SPDX-License-Identifier: Apache-2.0
"""The output head of a causal language model, apart from its backbone, so that logits can be made chunk by chunk."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class OutputHead:
    """Maps hidden states ``[n, hidden]`` to the logits ``[n, vocabulary]`` that the model itself would give.

    Besides the linear these are a soft cap (Gemma: `final_logit_softcapping`), a divisor (Granite: `logits_scaling`)
    and a factor (Cohere: `logit_scale`).
    """

    def __init__(self, model: Any) -> None:
        self.linear: nn.Module = model.get_output_embeddings()
        config = model.config.get_text_config(decoder=True)
        self.factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.cap = getattr(config, "final_logit_softcapping", None)

    @property
    def device(self) -> torch.device:
        """Where its weight is."""
        return next(chain(self.linear.parameters(), self.linear.buffers())).device

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute the logits; no gradient reaches the linear's parameters in `kl_divergence`."""
        weight = self.linear.weight
        assert isinstance(weight, Tensor)
        logits: Tensor = self.linear(hidden.to(weight.dtype))
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def backbone_hidden(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Hidden states ``[batch, sequence, hidden]`` of a causal language model's backbone."""
    hidden: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
    return hidden


def run_backbone(model: Any, ids: Tensor, seen: Iterable[nn.Module] = ()) -> None:
    """Run a model for what hooks see of it, without its output head where that is apart.

    The head is most of the arithmetic where the vocabulary is large and the model small (Gemma 3 of 270M: 0.34 of 0.54
    GFLOP a token), and its logits most of the memory.

    Args:
        model: a causal language model of transformers, or any module that maps ``input_ids=``.
        ids: token ids ``[batch, length]``, on the model's device.
        seen: modules with hooks, all of which are run.
    """
    backbone = getattr(model, "base_model", None)
    if isinstance(backbone, nn.Module) and backbone is not model and hasattr(model, "get_output_embeddings"):
        inside = {id(module) for module in backbone.modules()}
        if all(id(module) in inside for module in seen):
            backbone(input_ids=ids, use_cache=False)
            return
    model(input_ids=ids)


@torch.no_grad()
def find_head(model: Any, inputs: dict[str, Any], tokens: int = 8) -> OutputHead | None:
    """The head of `model`, if it gives the model's own logits on the first tokens of `inputs`.

    Args:
        model: a transformers causal language model, in evaluation mode.
        inputs: of a forward pass, without labels.
        tokens: how many are compared.

    Returns:
        None, with a warning, where the head trains or is sparse, or the logits differ; the model's full logits are to
        be used then.
    """
    reason = _why_not(model, {k: _first(v, tokens) for k, v in inputs.items()})
    if reason is None:
        return OutputHead(model)
    warnings.warn(
        f"The loss uses the full logits of {type(model).__name__}, which takes more memory: {reason}.", stacklevel=2
    )
    return None


def _why_not(model: Any, inputs: dict[str, Any]) -> str | None:
    linear = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if linear is None or model.base_model is model:
        return "its output head was not found"
    if hasattr(linear, "spon_threshold"):
        return "its output head is sparse"  # and not the same function in the dense model and in the sparse one
    if any(parameter.requires_grad for parameter in linear.parameters()):
        return "its output head is trained"
    try:
        made = OutputHead(model)(backbone_hidden(model, inputs)[0]).float()
    except (AttributeError, TypeError, RuntimeError) as error:
        return f"its backbone cannot be run alone ({error})"
    own = model(**inputs, use_cache=False).logits[0].float()
    if made.shape != own.shape or not torch.allclose(made, own, rtol=1e-2, atol=1e-2 * own.abs().max().item()):
        return "its head computes something else"
    return None


def _first(value: Any, tokens: int) -> Any:
    return value[:1, :tokens] if isinstance(value, Tensor) and value.dim() == 2 else value
