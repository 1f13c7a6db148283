# SPDX-License-Identifier: Apache-2.0
"""The layer that PEFT puts around a linear: masks its input and adds ``W (center + alpha)`` to its output.

The conventions are those of `peft/tuners/lora/layer.py`; the mask, the tokens and the merged layers are the core's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from spon_peft.config import SponConfig
from spon_peft.layer import SponLayer
from spon_plugin.adapter.mask import Mask
from spon_plugin.errors import SponError
from spon_plugin.kernels.masked_input import masked_input
from spon_plugin.layers.sparse_quantized import sparse_layer
from spon_plugin.masking import choose_rows
from spon_plugin.weights.importers.torch_linear import is_plain_matrix
from spon_plugin.weights.kept import KeptWeight


class SponLinear(nn.Module, SponLayer):
    """A `SponLayer` around `torch.nn.Linear`, Conv1D or a quantized linear.

    Args:
        base_layer: the linear.
        adapter_name: name of the first adapter.
        module_path: of the linear in the base model.
        config: the adapter's config.
        backend: PEFT's quantization backend of the linear, if it has one.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, module_path: str, config: SponConfig, backend: Any = None
    ) -> None:
        super().__init__()
        SponLayer.__init__(self, base_layer, backend)
        self._active_adapter = adapter_name
        self._weight = KeptWeight()
        self.update_layer(adapter_name, module_path, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``.

        Raises:
            SponError: `adapter_names` asks for a batch of mixed adapters.
        """
        if kwargs.pop("adapter_names", None) is not None:
            raise mixed_batch()
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        active = self.merged_adapters or self.active_adapters
        name = self.only_one([name for name in active if name in self.spon_threshold])
        if name is None:
            return self.base_layer(x, *args, **kwargs)
        dense = self.spon_tokens[name].rows(x) if name in self.spon_tokens else None
        mask = self.mask_of(name)
        if mask.threshold.device != x.device:  # offloaded: the base layer runs where its input is
            mask = mask.to(x.device)
        shift = mask.constant if self._trains_in_the_input(x, mask) else None
        y = self.base_layer(masked_input(x, mask.threshold, mask.center, shift, dense)[0], *args, **kwargs)
        if shift is not None:
            return y
        if self.merged:
            if dense is None or not self._has_constant(name):
                return y
            assert self._before_merge is not None
            return choose_rows(dense, _add(y, -self._before_merge[1].to(y.device)), y)
        constant = self._constant(mask, x.dtype)
        if constant is None:
            return y
        shifted = _add(y, constant)
        return choose_rows(dense, y, shifted)

    def _trains_in_the_input(self, x: Tensor, mask: Mask) -> bool:
        """Whether alpha is added to the input rather than ``W alpha`` to the output: where nothing is rounded by it."""
        alpha, weight = mask.alpha, getattr(self.get_base_layer(), "weight", None)
        return (
            alpha is not None
            and alpha.requires_grad
            and self.training  # rather than where gradients are made: checkpointing makes none in its first pass
            and not self.merged
            and isinstance(weight, Tensor)
            and is_plain_matrix(weight)
            and x.dtype == weight.dtype == alpha.dtype == torch.float32
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _has_constant(self, name: str) -> bool:
        """Whether the adapter adds something to the output that is the same for every token."""
        return name in self.spon_alpha or name in self.spon_center

    def _constant(self, mask: Mask, dtype: torch.dtype) -> Tensor | None:
        """``W (center + alpha)``, ``[out_features]``, differentiable in alpha; None where there is neither."""
        total = mask.constant
        return None if total is None else self._weight.of(self.get_base_layer(), dtype).product(total)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold ``W (center + alpha)`` into the base layer's bias, made if there is none; the mask stays.

        Args:
            safe_merge: refuse a bias that is not finite.
            adapter_names: the adapter to merge; the active one if None.

        Raises:
            SponError: more than one adapter would be merged.
            ValueError: with `safe_merge`, the new bias is not finite.
        """
        self._merge(safe_merge, adapter_names, self._host_dtype())

    def _merge(self, safe_merge: bool, adapter_names: list[str] | None, dtype: torch.dtype) -> None:
        """`merge`, into a bias of a dtype."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spon_threshold]
        if not names:
            return
        self.only_one([*self.merged_adapters, *names])
        name = names[0]
        base: Any = self.get_base_layer()
        with torch.no_grad():
            bias = self._constant(self.mask_of(name), dtype)
            if bias is not None:
                old = base.bias
                bias = bias if old is None else bias + old
                if safe_merge and not torch.isfinite(bias).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                new = bias.to(dtype)
                self._before_merge = old, new.float() if old is None else new.float() - old.float()
                _set_bias(base, new)
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Give the base layer its own bias back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.get_base_layer()
        if self._before_merge is not None:
            old, merged = self._before_merge[0], base.bias
            if old is not None:  # the model may have been moved or cast in the meantime
                old.data = old.data.to(merged.device, merged.dtype)
            _set_bias(base, old)
            self._before_merge = None
        self.merged_adapters.pop()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What takes this layer's place when PEFT unloads the model; called by `BaseTuner`.

        Returns:
            Without `merge`, the base layer as it was. With it, a `SparseLinear` or `SparseConv1D`.

        Raises:
            SponError: the base layer is quantized or not a plain linear, so no such layer computes the same.
        """
        base: Any = self.get_base_layer()
        if merge:
            self._merge(safe_merge, adapter_names, self._bias_dtype())
            if self.merged:
                base = self._sparse_layer()
        elif self.merged:
            self.unmerge()
        for name in list(self.spon_tokens):
            self._leave(name)
        return base

    def _sparse_layer(self) -> nn.Module:
        base: Any = self.get_base_layer()
        name = self.merged_adapters[0]
        if base.bias is None:
            zeros = torch.zeros(self.out_features, dtype=self._bias_dtype(), device=self.spon_threshold[name].device)
            _set_bias(base, zeros)
        layer = sparse_layer(base)
        layer.spon_threshold = self.spon_threshold[name].detach().clone()
        if name in self.spon_center:
            layer.spon_center = self.spon_center[name].detach().clone()
        layer.keep_dense_bias(base.bias if self._before_merge is None else self._before_merge[0])
        return layer

    def _host_dtype(self) -> torch.dtype:
        """The dtype of a bias that the base layer itself adds, beside `_bias_dtype` of one that our layers do."""
        base: Any = self.get_base_layer()
        dtype = self._bias_dtype()
        if base.bias is not None or dtype != torch.float32 or getattr(base, "compute_dtype", None) is not None:
            return dtype
        # torchao's weights are of the dtype that they compute in; compressed-tensors' scales are.
        for tensor in (getattr(base, name, None) for name in ("weight", "weight_scale")):
            if isinstance(tensor, Tensor) and tensor.dtype in (torch.bfloat16, torch.float16):
                return tensor.dtype
        return dtype

    def _bias_dtype(self) -> torch.dtype:
        base: Any = self.get_base_layer()
        weight = getattr(base, "weight", None)
        if base.bias is not None:
            return base.bias.dtype
        if self.quantization_backend is None and isinstance(weight, Tensor) and is_plain_matrix(weight):
            return weight.dtype
        return getattr(base, "compute_dtype", None) or torch.float32  # a packed weight's dtype says nothing

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SponLinear:
        alphas = {name: alpha.data for name, alpha in self.spon_alpha.items() if name not in self._cast_alphas}
        stores = (self.spon_threshold, self.spon_center)
        buffers = [(store, name, value) for store in stores for name, value in store.items()]
        super()._apply(fn, recurse)
        for name, alpha in alphas.items():
            if self.spon_alpha[name].dtype != torch.float32:
                self.spon_alpha[name].data = alpha.to(self.spon_alpha[name].device)
        for store, name, value in buffers:
            if store[name].dtype != torch.float32:
                store[name] = value.to(store[name].device)
        return self

    def __repr__(self) -> str:
        return "spon." + super().__repr__()


def _set_bias(base: nn.Module, bias: Tensor | None) -> None:
    """Put another tensor in the place of a host's bias, as what that was.

    An assignment would do on torch's linears. But compressed-tensors keeps parameters in a cache, which writes into the
    one that it has, and some hosts have a buffer.
    """
    is_buffer = "bias" in base._buffers
    for place in (base._parameters, base._buffers, base.__dict__):
        if "bias" in place:
            del place["bias"]
    if is_buffer:
        base.register_buffer("bias", bias)
    elif bias is None or isinstance(bias, nn.Parameter):
        base.register_parameter("bias", bias)
    else:
        base.register_parameter("bias", nn.Parameter(bias, requires_grad=False))


def mixed_batch() -> SponError:
    """The error for `adapter_names=` in a forward pass."""
    return SponError.of("adapter_names", "a batch with an adapter for each sample", "one adapter for the whole batch")


def _add(y: Tensor, bias: Tensor) -> Tensor:
    return (y + bias).to(y.dtype)  # bias is float32 and has a dimension, so the sum is in float32
