# SPDX-License-Identifier: Apache-2.0
"""Kernels that turn skipped inputs into skipped bytes.

`sparse_linear` is the one entry point. It computes ``y = W S(x) + bias`` and picks, by device, dtype and number of
rows, the implementation that measures fastest; `reference.sparse_linear` is the truth that all of them are held to.
"""

from spon_plugin.kernels.op import sparse_linear

__all__ = ["sparse_linear"]
