# SPDX-License-Identifier: Apache-2.0
"""Masks out of tensors by kind, and back; adapters hold them by linear."""

from spon_plugin import Mask


def make_masks(thresholds, alphas=None, centers=None):
    alphas, centers = alphas or {}, centers or {}
    return {path: Mask(threshold, centers.get(path), alphas.get(path)) for path, threshold in thresholds.items()}


def thresholds_of(adapter):
    return {path: mask.threshold for path, mask in adapter.masks.items()}


def alphas_of(adapter):
    return {path: mask.alpha for path, mask in adapter.masks.items() if mask.alpha is not None}


def centers_of(adapter):
    return {path: mask.center for path, mask in adapter.masks.items() if mask.center is not None}
