# SPDX-License-Identifier: Apache-2.0
"""SPON: input sparsification with spontaneous neurons, free of any host framework."""

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.adapter.config import SponFields
from spon_plugin.adapter.directory import read_adapter, write_adapter
from spon_plugin.adapter.mask import Mask
from spon_plugin.decoder.masked_linears import sparse_inputs
from spon_plugin.decoder.positions import read_as
from spon_plugin.decoder.sites import Site, find_sites
from spon_plugin.decoder.sparsity import SparsityCounter
from spon_plugin.errors import SponError
from spon_plugin.kernels.op import sparse_linear
from spon_plugin.layers.sparse_linear import SparseConv1D, SparseLinear
from spon_plugin.masking import keep_mask, sparsify
from spon_plugin.weights.fold import fold_alpha
from spon_plugin.weights.row_weight import RowWeight

__version__ = "0.1.0.dev0"

__all__ = [
    "Adapter",
    "Mask",
    "RowWeight",
    "Site",
    "SparseConv1D",
    "SparseLinear",
    "SparsityCounter",
    "SponError",
    "SponFields",
    "__version__",
    "find_sites",
    "fold_alpha",
    "keep_mask",
    "read_adapter",
    "read_as",
    "sparse_inputs",
    "sparse_linear",
    "sparsify",
    "write_adapter",
]
