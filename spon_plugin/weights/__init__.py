# SPDX-License-Identifier: Apache-2.0
"""Weights by input row: one file a format, what each kind of linear layer holds, and the fold of alpha into a bias.

`weight_of` is the one rule for whether and how a layer's weight can be read: it gives a `RowWeight`, or an `Opaque` for
a weight that only its own layer can multiply. `RowWeight.product` and `Opaque.product` are the only fold.
"""

from spon_plugin.weights.linears import is_linear, linear_features, weight_of
from spon_plugin.weights.opaque import Opaque
from spon_plugin.weights.row_weight import RowWeight

__all__ = ["Opaque", "RowWeight", "is_linear", "linear_features", "weight_of"]
