# SPDX-License-Identifier: Apache-2.0
"""`Mask`: the threshold, the centre and the alpha of one linear, which every host and study passes as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spon_plugin.errors import SponError
from spon_plugin.kernels.masked_input import masked_input

ALPHA, THRESHOLD, CENTER = "spon_alpha", "spon_threshold", "spon_center"
KINDS = (ALPHA, THRESHOLD, CENTER)
"""What files and layers call the tensors of a mask."""


@dataclass(frozen=True, eq=False)
class Mask:
    """What an adapter says about one linear, which then computes ``W S(x) + b + W alpha``; `S` as in `masking`.

    Attributes:
        threshold: float32 ``[1]`` or, per channel, ``[in_features]``; not negative.
        center: float32 ``[in_features]``, which takes the place of what is masked; None for 0.
        alpha: float32 ``[in_features]``, the spontaneous activation; None for none.
    """

    threshold: Tensor
    center: Tensor | None = None
    alpha: Tensor | None = None

    @property
    def per_channel(self) -> bool:
        """Whether there is a threshold for each input, not one for all."""
        return self.threshold.numel() > 1

    @property
    def constant(self) -> Tensor | None:
        """``center + alpha``, the part of the layer's input that is the same for every token; None for neither."""
        if self.center is None or self.alpha is None:
            return self.alpha if self.center is None else self.center
        return self.center.to(self.alpha.device) + self.alpha

    def sparse_deviation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``S(x) - center`` of a linear's input, and what was kept of it; see `spon_plugin.masking`.

        Args:
            x: ``[..., in_features]``, on the device of the mask.

        Returns:
            ``[..., in_features]`` in `x.dtype`, differentiable in `x`, and bool ``[..., in_features]``.
        """
        return masked_input(x, self.threshold, self.center)

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by the names in `KINDS`."""
        parts = {ALPHA: self.alpha, THRESHOLD: self.threshold, CENTER: self.center}
        return {kind: tensor for kind, tensor in parts.items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Mask:
        """The mask of what `function` makes of each tensor."""
        center, alpha = (None if vector is None else function(vector) for vector in (self.center, self.alpha))
        return Mask(function(self.threshold), center, alpha)

    def to(self, device: torch.device | str) -> Mask:
        """The same on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def without_alpha(self) -> Mask:
        """The same mask without spontaneous activation."""
        return replace(self, alpha=None)

    def check(self, path: str) -> None:
        """Check what can be checked without the layer.

        Args:
            path: of the linear, for the error.

        Raises:
            SponError: a tensor is not float32, of a wrong shape, not finite, or a negative threshold; or the vectors
                are not of one length.
        """
        for kind, tensor in self.tensors().items():
            key, is_vector = f"{path}.{kind}", tensor.dim() == 1 and tensor.numel() > 0
            shape = "shape [1] or [in_features]" if kind == THRESHOLD else "shape [in_features]"
            if tensor.dtype != torch.float32:
                raise SponError.of(key, tensor.dtype, "torch.float32")
            if not is_vector:
                raise SponError.of(key, tuple(tensor.shape), shape)
            if not bool(torch.isfinite(tensor).all()):
                raise SponError.of(key, "NaN or infinity", "finite values", "The adapter is broken; make it again.")
        if float(self.threshold.min()) < 0:
            raise SponError.of(f"{path}.{THRESHOLD}", float(self.threshold.min()), "a threshold >= 0")
        (first, vector), *others = self._vectors() or [(THRESHOLD, self.threshold)]
        for kind, other in others:
            if other.numel() != vector.numel():
                expected = f"shape ({vector.numel()},), the length of {path}.{first}"
                remedy = "A threshold may have shape (1,), too." if kind == THRESHOLD else ""
                raise SponError.of(f"{path}.{kind}", tuple(other.shape), expected, remedy)

    def check_input(self, path: str, in_features: int, base: str, remedy: str = "") -> None:
        """Check that the vectors are as long as the layer's input.

        Args:
            path: of the linear, for the error.
            in_features: of the linear.
            base: what the linear is part of, for the error.
            remedy: likewise.

        Raises:
            SponError: one of them has another length.
        """
        for kind, vector in self._vectors():
            if vector.numel() != in_features:
                raise SponError.of(f"{path}.{kind}", tuple(vector.shape), f"shape ({in_features},) for {base}", remedy)

    def _vectors(self) -> list[tuple[str, Tensor]]:
        """The tensors whose length is in_features."""
        found = ((ALPHA, self.alpha), (CENTER, self.center), (THRESHOLD, self.threshold if self.per_channel else None))
        return [(kind, vector) for kind, vector in found if vector is not None]


def masks_without_alpha(masks: Mapping[str, Mask]) -> dict[str, Mask]:
    """The same masks without spontaneous activations: an adapter's TEAL, or its WINA or SCAP."""
    return {path: mask.without_alpha() for path, mask in masks.items()}


def with_alphas(masks: Mapping[str, Mask], alphas: Mapping[str, Tensor]) -> dict[str, Mask]:
    """The same masks with other alphas.

    Args:
        masks: module path -> mask.
        alphas: module path -> float32 ``[in_features]``, for some of them; the others have none.

    Raises:
        SponError: an alpha belongs to a linear that has no mask.
    """
    for path in alphas:
        if path not in masks:
            raise SponError.of(f"{path}.{ALPHA}", "an alpha", "none, as the linear has no mask")
    return {path: replace(mask, alpha=alphas.get(path)) for path, mask in masks.items()}
