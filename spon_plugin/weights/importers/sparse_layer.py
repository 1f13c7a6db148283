# SPDX-License-Identifier: Apache-2.0
"""Our own layers over a host's codes, sparse and dense, which keep the weight as kernels read it."""

from __future__ import annotations

from spon_plugin.weights.importers.kind import Kind, named_features

SPARSE_QUANTIZED = Kind(
    "SparseQuantizedLinear",
    lambda module: type(module).__name__ in ("SparseQuantizedLinear", "RowQuantizedLinear"),
    named_features,
    lambda module: module.row_weight,
)
