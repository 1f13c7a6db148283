# SPDX-License-Identifier: Apache-2.0
"""The sparse kernel for CPUs, compiled by Numba, on the threads that torch has."""
