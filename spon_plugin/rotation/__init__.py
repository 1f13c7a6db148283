# SPDX-License-Identifier: Apache-2.0
"""Turn a model's residual stream so that masks lose less, and fold the rotation into its weights: free at run time."""
