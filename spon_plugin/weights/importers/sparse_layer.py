# SPDX-License-Identifier: Apache-2.0
"""Our own layers of merged models over codes: `SparseQuantizedLinear`, which keeps the weight as kernels read it."""

from __future__ import annotations

from spon_plugin.weights.importers.kind import Kind, named_features

SPARSE_QUANTIZED = Kind(
    "SparseQuantizedLinear",
    lambda module: type(module).__name__ == "SparseQuantizedLinear",
    named_features,
    lambda module: module.row_weight,
)
