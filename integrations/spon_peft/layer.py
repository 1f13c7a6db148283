# SPDX-License-Identifier: Apache-2.0
"""What a linear holds under PEFT: the thresholds, centres and alphas of its adapters, by name."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from spon_peft.config import SponConfig
from spon_peft.tokens import AdapterTokens
from spon_plugin.adapter.config import carries_alpha, names_module
from spon_plugin.adapter.mask import ALPHA, CENTER, KINDS, THRESHOLD, Mask
from spon_plugin.errors import SponError
from spon_plugin.weights.importers.torch_linear import is_offloaded, is_plain_matrix
from spon_plugin.weights.linears import is_linear, linear_features


class SponLayer(BaseTunerLayer):
    """Thresholds, centres and alphas of one linear, by adapter name.

    They stay float32 whatever the model is cast to: a rounded threshold is another mask. Only an alpha follows the base
    layer's dtype, and only where `follow_dtype` says so; what `state_dict` gives of it is float32, too.

    Attributes:
        spon_alpha: ``[in_features]`` parameters, for adapters that carry an alpha here.
        spon_threshold: float32 buffers for every adapter of this layer, ``[1]`` or ``[in_features]``.
        spon_center: float32 ``[in_features]`` buffers, for adapters that have a centre here.
        spon_tokens: which tokens each adapter leaves dense, for those that leave some; shared by the adapter's layers.
    """

    adapter_layer_names = ("spon_alpha",)
    other_param_names = ("spon_threshold", "spon_center")

    def __init__(self, base_layer: nn.Module, backend: Any = None) -> None:
        self.base_layer = base_layer
        self.quantization_backend = backend
        self.spon_alpha = nn.ParameterDict()
        self.spon_alpha.register_state_dict_post_hook(_in_float32)
        self._cast_alphas: set[str] = set()
        self._kept: dict[tuple[str, str], Tensor] = {}
        self.spon_threshold = BufferDict(persistent=True)
        self.spon_center = BufferDict(persistent=True)
        self.spon_tokens: dict[str, AdapterTokens] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # The bias before merging, and what that added to it, float32: in a tuple, where no state dict finds them.
        self._before_merge: tuple[Tensor | None, Tensor] | None = None
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
        threshold, center, alpha = (self._here(kind, adapter_name) for kind in (THRESHOLD, CENTER, ALPHA))
        if threshold is None:
            raise KeyError(adapter_name)
        return Mask(threshold, center, alpha)

    def _here(self, kind: str, adapter_name: str) -> Tensor | None:
        """A tensor of an adapter; None if there is none.

        accelerate, offloading a model, puts an empty one in its place and brings the values for the forward of the
        module that it belongs to. A dictionary has no forward, so the tensor itself is kept here.
        """
        tensor = _get(getattr(self, kind), adapter_name)
        return self._kept.get((kind, adapter_name), tensor) if tensor is not None and tensor.is_meta else tensor

    def restore(self, adapter_name: str) -> None:
        """Put the adapter's tensors back where accelerate's dispatching of a model has emptied them.

        For weights on disk it would look for them in the base model's files, whenever PEFT brings the layer in.
        """
        for kind in KINDS:
            store: Any = getattr(self, kind)
            kept = self._kept.get((kind, adapter_name))
            if adapter_name in store and store[adapter_name].is_meta and kept is not None and not kept.is_meta:
                (store._parameters if kind == ALPHA else store._buffers)[adapter_name] = kept
                add_hook_to_module(store, ModelHook())  # one that does nothing, in the place of the one that offloads

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

    def follow(self, adapter_name: str, tokens: AdapterTokens | None) -> None:
        """Have `tokens` say which tokens are dense for the adapter; None for none."""
        self._leave(adapter_name)
        if tokens is not None:
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
        for kind in KINDS:
            self._kept.pop((kind, adapter_name), None)
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
        if device is None and is_offloaded(base):
            device = torch.device(base._hf_hook.execution_device or "cpu")
        device = device or next((w.device for w in weights if isinstance(w, Tensor)), None)
        for kind in KINDS:
            store: Any = getattr(self, kind)
            if adapter_name not in store or store[adapter_name].device.type == "meta":
                continue
            value = store[adapter_name]
            if device is not None and device.type != "meta":
                moved = value.detach().to(device, self._alpha_dtype(adapter_name) if kind == ALPHA else torch.float32)
                if isinstance(value, nn.Parameter):
                    value.data = moved
                else:
                    store[adapter_name] = moved
            self._kept[kind, adapter_name] = store[adapter_name]


def _in_float32(module: nn.Module, state_dict: dict[str, Any], prefix: str, _local_metadata: Any) -> None:
    """What is saved of alphas is float32, the format's dtype, whatever they are trained in."""
    for name in dict(module.named_parameters(recurse=False)):
        tensor = state_dict.get(prefix + name)
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):  # one of `keep_vars` is the layer's own
            state_dict[prefix + name] = tensor.float()


def _get(store: Any, name: str) -> Tensor | None:
    return store[name] if name in store else None  # noqa: SIM401 (a BufferDict has no `get`)
