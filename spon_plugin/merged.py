# SPDX-License-Identifier: Apache-2.0
"""What a merged checkpoint's `quantization_config` says, for every host that reads one.

The thresholds stand there because loading a checkpoint in bfloat16 would round those among its tensors. The biases of
its linears are the folded ones; where tokens stay dense it holds the dense model's beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from spon_plugin.adapter import SponFields
from spon_plugin.errors import SponError

FIELD = "quantization_config"
"""What errors call the object."""


def read_fields(stored: Mapping[str, Any]) -> SponFields:
    """The adapter's fields that a merged checkpoint keeps; others have their defaults.

    Args:
        stored: the object as JSON has it. Without `dense_prefix` every token is masked.

    Raises:
        SponError: one of them is wrong, or the format is of another version or of none.
    """
    fields = SponFields(
        sparsity=stored.get("sparsity", SponFields.sparsity),
        tokens=stored.get("tokens", SponFields.tokens),
        dense_prefix=stored.get("dense_prefix", 0),
    )
    fields.format_version = stored.get("format_version")  # type: ignore[assignment]
    fields.check()
    return fields


def check_thresholds(thresholds: Any) -> dict[str, float]:
    """The thresholds: module path -> number.

    Raises:
        SponError: there are none, or one of them is not a finite number >= 0.
    """
    if not isinstance(thresholds, dict) or not thresholds:
        raise SponError.of(f"{FIELD}: thresholds", thresholds, "module paths with their thresholds")
    for path, value in thresholds.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise SponError.of(f"{FIELD}: threshold of {path}", value, "a finite number >= 0")
    return dict(thresholds)


def holds_dense_biases(dense_prefix: int, tokens: str) -> bool:
    """Whether some tokens of the model stay dense, so that the checkpoint has `spon_dense_bias` tensors."""
    return dense_prefix > 0 or tokens != "all"
