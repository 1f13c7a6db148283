# SPDX-License-Identifier: Apache-2.0
"""The adapter directory and merged checkpoints: what stands on disk, read and written strictly."""
