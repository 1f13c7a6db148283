# SPDX-License-Identifier: Apache-2.0
"""`SparseLinear` and `SparseConv1D`: the layers that a merged model is made of."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spon_plugin import machine
from spon_plugin.kernels import sparse_linear
from spon_plugin.kernels.cpu.layer_call import LayerCall
from spon_plugin.kernels.gemm import dense_linear
from spon_plugin.kernels.op import implementation
from spon_plugin.layers.shared_calls import SharedCalls
from spon_plugin.masking import deviation, sparse_deviation
from spon_plugin.weights.linears import is_conv1d, linear_features


class DenseRows(Protocol):
    """What a layer asks which of its tokens are dense: `spon_plugin.decoder.tokens.DenseTokens`."""

    def rows(self, x: Tensor) -> Tensor | None:
        """Bool ``[...]`` for an input ``[..., in_features]``, True for dense; None for no dense token."""


class SparseLayer(nn.Module):
    """What the layers of a merged model share: a mask, a folded bias, and tokens that may stay dense."""

    weight: Tensor
    bias: Any
    spon_threshold: Tensor
    spon_center: Tensor | None
    spon_dense_bias: Tensor | None
    tokens: DenseRows | None = None
    shared: SharedCalls | None = None
    """What the layer has in common with those beside it; see `share_calls`."""

    def _register_spon_buffers(self, device: torch.device | str | None) -> None:
        self.register_buffer("spon_threshold", torch.zeros(1, dtype=torch.float32, device=device))
        self.register_buffer("spon_center", None)
        self.register_buffer("spon_dense_bias", None)
        self._few_rows = LayerCall()

    def keep_dense_bias(self, bias: Tensor | None = None) -> None:
        """Hold the bias ``[out_features]`` of tokens that stay dense; None for zeros."""
        like = self.bias if self.bias is not None else self.weight[..., 0]
        out_features = linear_features(self)[1]
        value = torch.zeros(out_features, dtype=like.dtype, device=like.device) if bias is None else bias.detach()
        self.spon_dense_bias = value.clone()

    @property
    def weight_t(self) -> Tensor:
        """The weight as ``[in_features, out_features]``, a view."""
        return self.weight.t()

    @property
    def kernel(self) -> str:
        """What computes masked tokens here, in words: a sparse kernel for few rows, or a masked dense product."""
        weight_t = self.weight_t
        row = weight_t.new_empty((1, weight_t.shape[0]))
        few = implementation(row) if weight_t.is_contiguous() else "gemm"
        if few == "gemm":
            return "masked dense product"
        many = "" if machine.is_native(row.dtype, row.device) else " in float32, as this CPU emulates its dtype"
        return f"spon::sparse_linear ({few}), masked dense for many rows{many}"

    def arrange_for_kernels(self) -> None:
        """Lay the weight out by inputs, ``[in_features, out_features]`` contiguous, as the sparse kernels read it.

        Its shape, its values and what `state_dict` gives stay as they are; there is still one copy. A layer whose
        weight lies otherwise masks, and multiplies densely. One whose threshold is 0 has nothing to skip and is left
        alone: it goes on computing what `torch.nn.Linear` does, bit for bit, which no other layout would.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        if self.shared is not None and self.tokens is None and not torch.compiler.is_compiling():
            y = self.shared(self, x)  # type: ignore[arg-type]
            if y is not None:
                return y
        dense = None if self.tokens is None else self.tokens.rows(x)
        center = self._buffers["spon_center"]  # past the lookup of `nn.Module`, which takes half a microsecond
        if center is not None and dense is None:
            # The kernels know no centre: taking it off here reads x once more, which is little beside the weights.
            x, center = deviation(x, center), None
        if dense is None:
            y = self._masked(x)
            if y is not None:
                return y
        kept = sparse_deviation(x, self.spon_threshold, dense, center)
        if dense is None or self.spon_dense_bias is None:
            return self._dense(kept, self.bias)
        bias = torch.zeros_like(self.spon_dense_bias) if self.bias is None else self.bias
        return self._dense(kept, None) + torch.where(dense.unsqueeze(-1), self.spon_dense_bias, bias)

    def _masked(self, x: Tensor) -> Tensor | None:
        """The output, the mask in the kernel; None where no kernel of ours is to compute it."""
        if not torch.compiler.is_compiling():
            y = self._few_rows(self, x, self._buffers["spon_threshold"])  # type: ignore[arg-type]
            if y is not None:
                return y
        weight_t = self.weight_t
        # Autocast chooses the dtypes of torch's own products; it does not know ours.
        own = x.dtype == weight_t.dtype and weight_t.is_contiguous()
        if own and not torch.is_autocast_enabled(x.device.type):
            return sparse_linear(x, weight_t, self.spon_threshold, self.bias)
        return None

    def _dense(self, kept: Tensor, bias: Tensor | None) -> Tensor:
        """The output for inputs that are masked already."""
        return dense_linear(kept, self.weight_t, bias)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        _apply_keeping_float32(self, fn, super()._apply, recurse)
        return self


class SparseLinear(SparseLayer, nn.Linear):
    """``y = W S(x) + bias``, with ``bias = b + W alpha`` folded in beforehand.

    With a centre it is ``y = W (S(x) - center) + bias``, with ``bias = b + W (center + alpha)``.

    What PEFT-merged and exported models run: `kernels.sparse_linear`, once `arrange_for_kernels` has been called. Same
    parameters as `torch.nn.Linear`, and buffers besides, so state dicts interchange. Every token is masked, unless
    `tokens` says otherwise: dense tokens compute ``W x + spon_dense_bias``, as in the dense model.

    Attributes:
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]``.
        spon_threshold: float32 ``[1]`` or, per channel, ``[in_features]``; 0 masks nothing but zeros.
        spon_center: float32 ``[in_features]``, or None for 0; see `masking.sparsify`.
        spon_dense_bias: ``[out_features]``, the bias of dense tokens; None where every token is masked.
        tokens: says which tokens are dense; see `decoder.tokens.follow_tokens`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._register_spon_buffers(device)

    def arrange_for_kernels(self) -> None:
        """See `SparseLayer.arrange_for_kernels`."""
        weight = self.weight.data
        skips = weight.device.type != "meta" and bool(self.spon_threshold.any())
        if skips and not weight.t().is_contiguous():
            self.weight.data = weight.t().contiguous().t()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:  # safetensors, and whoever loads the file, take contiguous tensors only
            destination[prefix + "weight"] = destination[prefix + "weight"].contiguous()


class SparseConv1D(SparseLayer):
    """`SparseLinear` for GPT-2's Conv1D, whose weight lies ``[in_features, out_features]``.

    Attributes:
        nx: in_features, by the name that transformers gives it.
        nf: out_features, likewise.
        weight: ``[in_features, out_features]``.
        bias: ``[out_features]``.
        spon_threshold: as in `SparseLinear`.
        spon_center: likewise.
        spon_dense_bias: as in `SparseLinear`.
        tokens: as in `SparseLinear`.
    """

    def __init__(
        self, nf: int, nx: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(nf, device=device, dtype=dtype))
        self._register_spon_buffers(device)
        if self.weight.device.type != "meta":
            nn.init.normal_(self.weight, std=0.02)

    @property
    def weight_t(self) -> Tensor:
        """The weight, which lies so already."""
        return self.weight

    def extra_repr(self) -> str:
        """Show the layer as transformers shows Conv1D."""
        return f"nf={self.nf}, nx={self.nx}"


def sparse_like(linear: nn.Module, device: torch.device | str | None = None) -> SparseLinear | SparseConv1D:
    """A sparse layer that can take the place of `linear`: of its kind, sizes, dtype and mode, with a bias.

    Its tensors are its own; the threshold is 0.

    Args:
        linear: `torch.nn.Linear` or Conv1D, with a weight of floating point.
        device: by default that of `linear`; ``"meta"`` for a layer that is given its tensors afterwards.

    Raises:
        SponError: `linear` is not a linear layer.
    """
    in_features, out_features = linear_features(linear)
    weight: Any = linear.weight
    where: dict[str, Any] = {"device": weight.device if device is None else device, "dtype": weight.dtype}
    if is_conv1d(linear):
        return SparseConv1D(out_features, in_features, **where).train(linear.training)
    return SparseLinear(in_features, out_features, **where).train(linear.training)


def share_calls(model: nn.Module) -> None:
    """Let the sparse layers of each module of a model be called together where they read the same tensor."""
    for module in model.modules():
        layers = [
            child
            for child in module.children()
            if isinstance(child, SparseLayer) and not isinstance(child, SparseConv1D)
        ]
        if len(layers) > 1:
            shared = SharedCalls()
            for layer in layers:
                layer.shared = shared


def _apply_keeping_float32(module: nn.Module, fn, apply, recurse: bool) -> None:  # type: ignore[no-untyped-def]
    """Run ``module.to(...)`` but leave threshold and centre float32: ``model.half()`` must not move the mask."""
    kept = {name: module._buffers[name] for name in ("spon_threshold", "spon_center")}
    apply(fn, recurse)
    for name, value in kept.items():
        moved = module._buffers[name]
        if value is not None and moved is not None and moved.dtype != torch.float32:
            setattr(module, name, value.to(moved.device))
