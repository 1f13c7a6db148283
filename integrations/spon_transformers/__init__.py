# SPDX-License-Identifier: Apache-2.0
"""Merged SPON models in transformers: `save_pretrained` writes them, `from_pretrained` builds them again.

`sparse_view` and `dense_view` make two models of one copy of the weights, the sparse one of which drafts for the other.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from spon_plugin.adapter.adapter import Adapter
    from spon_transformers.lossless import dense_view, sparse_view

__all__ = ["dense_view", "mark_merged", "register", "sparse_view"]


def __getattr__(name: str) -> Any:
    if name in ("dense_view", "sparse_view"):
        from spon_transformers import lossless

        return getattr(lossless, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make ``quant_method: spon`` known to transformers; calling it again is harmless.

    Raises:
        RuntimeError: another package has registered that method.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    from spon_plugin.adapter.merged import QUANT_METHOD
    from spon_transformers.quantizer import SponQuantizationConfig, make_quantizer

    tables: list[tuple[Any, Any]] = [
        (AUTO_QUANTIZATION_CONFIG_MAPPING, SponQuantizationConfig),
        (AUTO_QUANTIZER_MAPPING, make_quantizer),
    ]
    for table, ours in tables:
        if table.setdefault(QUANT_METHOD, ours) is not ours:
            raise RuntimeError(
                f"{table[QUANT_METHOD]} is registered as the quantization method {QUANT_METHOD} already."
            )


def mark_merged(model: nn.Module, adapter: Adapter) -> None:
    """Finish a model whose targets have become sparse layers.

    Its forward pass leaves dense what the adapter leaves dense, and a transformers model saves what it is in its
    `config.json`.

    Args:
        model: any model with sparse layers.
        adapter: what was merged into it.
    """
    from spon_transformers.quantizer import mark_merged

    register()
    mark_merged(model, adapter)
