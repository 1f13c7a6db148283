# SPDX-License-Identifier: Apache-2.0
"""Distilling the dense model into alphas: the loss, the schedule, the loop."""
