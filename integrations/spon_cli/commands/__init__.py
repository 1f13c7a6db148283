# SPDX-License-Identifier: Apache-2.0
"""The sub-commands of `spon`, one a file; what they share is one folder up."""
