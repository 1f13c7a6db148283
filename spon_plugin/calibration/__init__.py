# SPDX-License-Identifier: Apache-2.0
"""What calibration measures on some text, and how a target sparsity becomes thresholds."""
