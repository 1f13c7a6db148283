# SPDX-License-Identifier: Apache-2.0
"""The layer that PEFT puts around a linear: masks its input and adds ``W (center + alpha)`` to its output.

The conventions are those of `peft/tuners/lora/layer.py`; the mask, the tokens and the merged layers are the core's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from spon_peft.config import SponConfig
from spon_peft.tokens import AdapterTokens
from spon_plugin.adapter.config import carries_alpha, names_module
from spon_plugin.adapter.mask import Mask
from spon_plugin.errors import SponError
from spon_plugin.layers.sparse_linear import SparseConv1D, SparseLinear
from spon_plugin.masking import choose_rows, sparse_deviation
from spon_plugin.weights import weight_of
from spon_plugin.weights.importers.torch_linear import is_plain_matrix
from spon_plugin.weights.linears import is_conv1d, is_linear, linear_features


class SponLayer(BaseTunerLayer):
    """Thresholds, centres and alphas of one linear, by adapter name.

    They stay float32 whatever the model is cast to: a rounded threshold is another mask. Only an alpha follows the base
    layer's dtype, and only where `follow_dtype` says so; what `state_dict` gives of it is float32, too.

    Attributes:
        spon_alpha: ``[in_features]`` parameters, for adapters that carry an alpha here.
        spon_threshold: float32 buffers for every adapter of this layer, ``[1]`` or ``[in_features]``.
        spon_center: float32 ``[in_features]`` buffers, for adapters that have a centre here.
        spon_tokens: which tokens each adapter leaves dense; shared by all layers of the adapter.
    """

    adapter_layer_names = ("spon_alpha",)
    other_param_names = ("spon_threshold", "spon_center")

    def __init__(self, base_layer: nn.Module, backend: Any = None) -> None:
        self.base_layer = base_layer
        self.quantization_backend = backend
        self.spon_alpha = nn.ParameterDict()
        self.spon_alpha.register_state_dict_post_hook(_in_float32)
        self._cast_alphas: set[str] = set()
        self.spon_threshold = BufferDict(persistent=True)
        self.spon_center = BufferDict(persistent=True)
        self.spon_tokens: dict[str, AdapterTokens] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._bias_before_merge: Tensor | None = None
        base: Any = self.get_base_layer()
        if is_linear(base):
            self.in_features, self.out_features = linear_features(base)
        else:
            self.in_features, self.out_features = int(base.in_features), int(base.out_features)

    def update_layer(self, adapter_name: str, module_path: str, config: SponConfig) -> None:
        """Add an adapter, or replace the one of that name.

        Args:
            adapter_name: its name.
            module_path: of this layer in the base model; the config says by it what the layer has.
            config: its config.
        """
        if adapter_name in self.merged_adapters:
            raise SponError.of("adapter_name", adapter_name, "an adapter that is not merged", "Unmerge it first.")
        per_channel = names_module(config.channel_modules, module_path)
        self.spon_threshold[adapter_name] = torch.zeros(self.in_features if per_channel else 1, dtype=torch.float32)
        if adapter_name in self.spon_center:
            del self.spon_center[adapter_name]
        if names_module(config.center_modules, module_path):
            self.spon_center[adapter_name] = torch.zeros(self.in_features, dtype=torch.float32)
        if carries_alpha(module_path, config.alpha_modules):
            self.spon_alpha[adapter_name] = nn.Parameter(torch.zeros(self.in_features, dtype=torch.float32))
        if not config.init_weights:
            nn.init.uniform_(self.spon_threshold[adapter_name], 0.1, 0.5)
            if adapter_name in self.spon_alpha:
                nn.init.normal_(self.spon_alpha[adapter_name], std=0.5)
            if adapter_name in self.spon_center:
                nn.init.normal_(self.spon_center[adapter_name], std=0.2)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def mask_of(self, adapter_name: str) -> Mask:
        """What an adapter has here: the tensors themselves, alpha as the parameter that is trained."""
        center, alpha = _get(self.spon_center, adapter_name), _get(self.spon_alpha, adapter_name)
        return Mask(self.spon_threshold[adapter_name], center, alpha)

    def follow_dtype(self, adapter_name: str, follow: bool) -> None:
        """Have the adapter's alpha follow the dtype of the base layer's weight, or stay float32.

        A quantized weight has no dtype to follow.
        """
        (self._cast_alphas.add if follow else self._cast_alphas.discard)(adapter_name)
        if adapter_name in self.spon_alpha:
            alpha = self.spon_alpha[adapter_name]
            alpha.data = alpha.data.to(self._alpha_dtype(adapter_name))

    def _alpha_dtype(self, adapter_name: str) -> torch.dtype:
        weight = getattr(self.get_base_layer(), "weight", None)
        follows = adapter_name in self._cast_alphas and is_plain_matrix(weight)
        return weight.dtype if follows and isinstance(weight, Tensor) else torch.float32

    def follow(self, adapter_name: str, tokens: AdapterTokens) -> None:
        """Have `tokens` say which tokens are dense for the adapter."""
        self._leave(adapter_name)
        tokens.layers += 1
        self.spon_tokens[adapter_name] = tokens

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter active; see `BaseTunerLayer.set_adapter`.

        Raises:
            SponError: two of the names have a mask for this layer.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.only_one([name for name in names if name in self.spon_threshold])
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; see `BaseTunerLayer.delete_adapter`."""
        self._leave(adapter_name)
        self._cast_alphas.discard(adapter_name)
        super().delete_adapter(adapter_name)

    @staticmethod
    def only_one(names: list[str]) -> str | None:
        """The one name in `names`, or None.

        Raises:
            SponError: there are two or more.
        """
        if len(names) > 1:
            raise SponError.of("adapters", names, "one SPON adapter on a layer", "Two masks cannot be added up.")
        return names[0] if names else None

    def _leave(self, adapter_name: str) -> None:
        tokens = self.spon_tokens.pop(adapter_name, None)
        if tokens is not None:
            tokens.layers -= 1
            if tokens.layers == 0:
                tokens.detach()

    def _get_available_adapters(self) -> set[str]:
        return set(self.spon_threshold.keys())  # an adapter without an alpha here is here all the same

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # As in BaseTunerLayer, whose cast to the dtype of the weight no threshold and no centre may have.
        base: Any = self.get_base_layer()
        weights = (getattr(base, name, None) for name in ("weight", "qweight", "W_q"))
        device = device or next((w.device for w in weights if isinstance(w, Tensor)), None)
        if device is None or device.type == "meta":
            return
        for store in (self.spon_alpha, self.spon_threshold, self.spon_center):
            if adapter_name not in store or store[adapter_name].device.type == "meta":
                continue
            value = store[adapter_name]
            dtype = self._alpha_dtype(adapter_name) if store is self.spon_alpha else torch.float32
            moved = value.detach().to(device, dtype)
            if isinstance(value, nn.Parameter):
                value.data = moved
            else:
                store[adapter_name] = moved


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
        center = _get(self.spon_center, name)
        y = self.base_layer(sparse_deviation(x, self.spon_threshold[name], dense, center), *args, **kwargs)
        if self.merged:
            if dense is None or not self._has_constant(name):
                return y
            return choose_rows(dense, _add(y, -self._folded()), y)
        constant = self._constant(name, x.dtype)
        if constant is None:
            return y
        shifted = _add(y, constant)
        return choose_rows(dense, y, shifted)

    def _has_constant(self, name: str) -> bool:
        """Whether the adapter adds something to the output that is the same for every token."""
        return name in self.spon_alpha or name in self.spon_center

    def _constant(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """``W (center + alpha)``, ``[out_features]``, differentiable in alpha; None where there is neither."""
        total = self.mask_of(name).constant
        return None if total is None else weight_of(self.get_base_layer(), dtype).product(total)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold ``W (center + alpha)`` into the base layer's bias, made if there is none; the mask stays.

        Args:
            safe_merge: refuse a bias that is not finite.
            adapter_names: the adapter to merge; the active one if None.

        Raises:
            SponError: more than one adapter would be merged.
            ValueError: with `safe_merge`, the new bias is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spon_threshold]
        if not names:
            return
        self.only_one([*self.merged_adapters, *names])
        name = names[0]
        base: Any = self.get_base_layer()
        with torch.no_grad():
            bias = self._constant(name, self._bias_dtype())
            if bias is not None:
                old = base.bias
                bias = bias if old is None else bias + old
                if safe_merge and not torch.isfinite(bias).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                base.bias = nn.Parameter(bias.to(self._bias_dtype()), requires_grad=False)
                self._bias_before_merge = old
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Give the base layer its own bias back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.get_base_layer()
        if self._has_constant(self.merged_adapters.pop()):
            old, merged = self._bias_before_merge, base.bias
            base.bias = old
            if old is not None:  # the model may have been moved or cast in the meantime
                old.data = old.data.to(merged.device, merged.dtype)
            self._bias_before_merge = None

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
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
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
        device, dtype = base.weight.device, base.weight.dtype
        layer: SparseLinear | SparseConv1D
        if is_conv1d(base):
            layer = SparseConv1D(self.out_features, self.in_features, device="meta", dtype=dtype)
        else:
            layer = SparseLinear(self.in_features, self.out_features, device="meta", dtype=dtype)
        if base.bias is None:
            base.bias = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device), requires_grad=False)
        layer.weight, layer.bias = base.weight, base.bias
        layer.spon_threshold = self.spon_threshold[name].detach().clone()
        if name in self.spon_center:
            layer.spon_center = self.spon_center[name].detach().clone()
        if name in self.spon_tokens and self.spon_tokens[name].leaves_any_dense:
            layer.keep_dense_bias(self._bias_before_merge if self._has_constant(name) else base.bias)
        return layer.train(base.training)

    def _folded(self) -> Tensor:
        """What merging added to the bias, float32."""
        bias: Any = self.get_base_layer().bias
        old = self._bias_before_merge
        return bias.float() if old is None else bias.float() - old.to(bias.device).float()

    def _bias_dtype(self) -> torch.dtype:
        base: Any = self.get_base_layer()
        weight = getattr(base, "weight", None)
        if base.bias is not None:
            return base.bias.dtype
        if self.quantization_backend is None and weight is not None and weight.is_floating_point():
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


def _in_float32(module: nn.Module, state_dict: dict[str, Any], prefix: str, _local_metadata: Any) -> None:
    """What is saved of alphas is float32, the format's dtype, whatever they are trained in."""
    for name in dict(module.named_parameters(recurse=False)):
        tensor = state_dict.get(prefix + name)
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):  # one of `keep_vars` is the layer's own
            state_dict[prefix + name] = tensor.float()


def mixed_batch() -> SponError:
    """The error for `adapter_names=` in a forward pass."""
    return SponError.of("adapter_names", "a batch with an adapter for each sample", "one adapter for the whole batch")


def _get(store: Any, name: str) -> Tensor | None:
    return store[name] if name in store else None  # noqa: SIM401 (a BufferDict has no `get`)


def _add(y: Tensor, bias: Tensor) -> Tensor:
    return (y + bias).to(y.dtype)  # bias is float32 and has a dimension, so the sum is in float32
