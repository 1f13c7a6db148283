# SPDX-License-Identifier: Apache-2.0
"""The kinds of linear layers that can be sparsified, and the one rule for whether and how their weight can be read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.errors import SponError
from spon_plugin.weights.importers.awq import AWQ
from spon_plugin.weights.importers.bitsandbytes import BITSANDBYTES_4BIT, BITSANDBYTES_8BIT
from spon_plugin.weights.importers.compressed_tensors import COMPRESSED_TENSORS, COMPRESSED_TENSORS_ROUNDED
from spon_plugin.weights.importers.conv1d import CONV1D, SPARSE_CONV1D, is_conv1d
from spon_plugin.weights.importers.eight_bit import EIGHT_BIT
from spon_plugin.weights.importers.gguf import GGUF
from spon_plugin.weights.importers.gptq import GPTQ
from spon_plugin.weights.importers.kind import Kind, named_features
from spon_plugin.weights.importers.sparse_layer import SPARSE_QUANTIZED
from spon_plugin.weights.importers.torch_linear import LINEAR
from spon_plugin.weights.importers.torchao import TORCHAO
from spon_plugin.weights.opaque import Opaque
from spon_plugin.weights.row_weight import RowWeight

# The first that matches. A new source is a file in `importers` and a row here.
KINDS = (
    CONV1D,
    SPARSE_CONV1D,
    SPARSE_QUANTIZED,
    BITSANDBYTES_8BIT,
    BITSANDBYTES_4BIT,
    TORCHAO,
    COMPRESSED_TENSORS,
    COMPRESSED_TENSORS_ROUNDED,
    GPTQ,
    AWQ,
    GGUF,
    EIGHT_BIT,
    LINEAR,
)

__all__ = ["KINDS", "is_conv1d", "is_linear", "is_sparse", "kind_of", "linear_features", "weight_of"]


def kind_of(module: nn.Module) -> Kind | None:
    """The row of `KINDS` that `module` belongs to; None if it is no linear layer."""
    return next((kind for kind in KINDS if kind.matches(module)), None)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer that can be sparsified."""
    return kind_of(module) is not None


def is_sparse(module: nn.Module) -> bool:
    """Whether `module` is a layer of a merged model, which masks its input already."""
    return any(cls.__name__ == "SparseLayer" for cls in type(module).__mro__)


def linear_features(module: nn.Module, name: str = "layer") -> tuple[int, int]:
    """``(in_features, out_features)`` of a linear layer.

    Raises:
        SponError: `module` is not a linear layer.
    """
    kind = kind_of(module)
    if kind is None:
        raise SponError.of(name, type(module).__name__, "a linear layer (torch.nn.Linear or Conv1D)")
    return kind.features(module)


def weight_of(module: nn.Module, dtype: torch.dtype | None = None, name: str = "layer") -> RowWeight | Opaque:
    """The weight of a linear layer, as a view where it can be one.

    Args:
        module: a linear layer of one of `KINDS`, or anything that names its `in_features` and `out_features` and maps
            the one to the other linearly, whose weight is then opaque.
        dtype: in which a weight that cannot be read is asked, where the layer itself does not say; usually the dtype of
            its input. By default torch's.
        name: the layer's name, for the error.

    Returns:
        `Opaque` for a weight that is packed in no known way, sharded (FSDP, ZeRO-3, tensor parallel) or elsewhere
        (offloaded).

    Raises:
        SponError: `module` is not a linear layer.
    """
    kind = kind_of(module)
    anything: Any = module
    if kind is not None:
        found = kind.weight(module)
        if isinstance(found, RowWeight):
            return found
        features, reason, decode = kind.features(module), found.reason, found.decode
    elif hasattr(module, "in_features") and hasattr(module, "out_features"):
        features, reason, decode = named_features(module), f"a {type(module).__name__}", None
    else:
        features, reason, decode = linear_features(module, name), "", None
    own = getattr(anything, "weight", None)
    compute_dtype = getattr(anything, "compute_dtype", None)
    if compute_dtype is None and isinstance(own, Tensor) and own.is_floating_point() and own.element_size() > 1:
        compute_dtype = own.dtype
    return Opaque(module, *features, compute_dtype or dtype or torch.get_default_dtype(), reason, decode)
