# SPDX-License-Identifier: Apache-2.0
"""The sparse kernels for GPUs, and how they are launched."""
