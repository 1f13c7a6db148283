# SPDX-License-Identifier: Apache-2.0
"""Whether a model can read the windows that a tokenizer made: their ids and their length."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from spon_plugin.errors import SponError

_OFFSET = 8  # more rows than positions: OPT and its kin count from 2


def check_length(model: Any, length: int, field: str = "window") -> None:
    """Check the length of windows before a text is tokenized.

    Args:
        model: a `PreTrainedModel`.
        length: tokens per window.
        field: what errors call it.

    Raises:
        SponError: the model has learned fewer positions. Rotary and relative positions have no such end.
    """
    positions = learned_positions(model)
    if positions is not None and length > positions:
        raise SponError.of(field, length, f"at most {positions} tokens, the positions that the model has learned")


def check_ids(model: Any, ids: Tensor) -> None:
    """Check token ids of any shape.

    Raises:
        SponError: one is larger than the model's vocabulary.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    top = int(ids.max()) if ids.numel() else 0
    if top >= vocabulary:
        expected = f"ids below {vocabulary}, the size of the model's vocabulary"
        raise SponError.of("tokenizer", f"token id {top}", expected, "Is it the model's own tokenizer?")


def learned_positions(model: Any) -> int | None:
    """How many positions a model has an embedding for; None where positions are computed.

    Args:
        model: a `PreTrainedModel`.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        is_table = isinstance(module, nn.Embedding) and ("pos" in leaf or leaf == "wpe")
        if is_table and limit <= module.num_embeddings <= limit + _OFFSET:
            return limit
    return None
