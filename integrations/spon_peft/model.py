# SPDX-License-Identifier: Apache-2.0
"""`SponModel`, the tuner: puts `SponLinear` around the targeted linears of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from spon_peft.adapters import check_injected, check_tensors, collect_adapter, injected_layers
from spon_peft.layer import SponLayer
from spon_peft.linear import SponLinear, mixed_batch
from spon_peft.targets import default_targets
from spon_peft.tokens import AdapterTokens
from spon_plugin.adapter.base import base_digest
from spon_plugin.decoder.left_dense import is_inside, read_by_parents, text_decoder
from spon_plugin.decoder.sites import check_dense
from spon_plugin.errors import SponError
from spon_plugin.layers.sparse_quantized import SparseQuantizedLinear
from spon_plugin.weights import Opaque, weight_of
from spon_plugin.weights.dense import DenseWeight
from spon_plugin.weights.linears import is_linear
from spon_plugin.weights.scaled import ScaledWeight

_NOT_MERGED = (
    "Use `merge_adapter`, which keeps the adapter's layers, or another base: `spon quantize` makes one whose codes "
    "lie by rows."
)


class SponModel(BaseTuner):
    """Makes a model's linears sparse in their inputs, with spontaneous activations (arXiv 2512.12744).

    Args:
        model: the dense model, changed in place.
        config: a `SponConfig`, or adapter name -> `SponConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled by loading.

    Raises:
        SponError: a targeted module is not a linear, or none are given and the model has no blocks of linears.
    """

    prefix = "spon_"
    tuner_layer_cls = SponLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Create the adapter's layers; see `BaseTuner.inject_adapter`.

        Raises:
            SponError: the model is a merged one, the config was read from an adapter whose tensors do not fit the
                layers, or the adapter leaves tokens dense by their position in a model that tells its blocks none.
        """
        check_dense(model)
        self._warn_of_another_base(model, adapter_name)
        self._read, (self._part, _) = read_by_parents(model), text_decoder(model)
        self._outside: list[str] = []
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        if self._outside:
            count, first = len(self._outside), self._outside[0]
            warnings.warn(f"{count} targets outside the text decoder, such as {first}, are left dense.", stacklevel=2)
        check_injected(config, model, adapter_name)
        layers = injected_layers(model, adapter_name)
        tokens = AdapterTokens.of(config, model, layers)
        for layer in layers.values():
            layer.follow(adapter_name, tokens)

    def _warn_of_another_base(self, model: nn.Module, adapter_name: str) -> None:
        """Say that an adapter was made for other weights of the same shape, where the weights at hand tell."""
        config: Any = self.peft_config[adapter_name]
        if not config.base_digest or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            return
        digest = base_digest(model)
        if digest and digest != config.base_digest:
            warnings.warn(
                f"The adapter was made for other weights, those of {config.base_model_name_or_path!r} (base_digest "
                f"{config.base_digest[:12]}); this {type(model).__name__} has {digest[:12]}. Thresholds and alphas "
                "may not fit: load that model, or evaluate before you rely on it.",
                stacklevel=2,
            )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in injected_layers(self.model, adapter_name).values():
            layer.restore(adapter_name)  # PEFT calls this when the model has been dispatched
            layer.follow_dtype(adapter_name, not autocast_adapter_dtype)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter active; see `BaseTuner.set_adapter`.

        Raises:
            SponError: two of the names have a mask for one layer; nothing has changed then.
        """
        self._check_one_mask([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold an adapter into the base model's biases, under its mask; see `BaseTuner.merge_adapter`.

        Raises:
            SponError: two of the names have a mask for one layer; nothing has changed then.
        """
        self._check_one_mask(adapter_names or self.active_adapters)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _check_one_mask(self, names: list[str]) -> None:
        for module in self.model.modules():
            if isinstance(module, SponLayer):
                module.only_one([name for name in names if name in module.spon_threshold])

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(self.model)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not is_inside(current_key, self._part) and target is not getattr(self.model, "lm_head", None):
            self._outside.append(current_key)
            return
        if isinstance(target, SponLinear):
            target.update_layer(adapter_name, current_key, peft_config)
            return
        backend = self._check_target(target, current_key)
        layer = SponLinear(target, adapter_name, current_key, peft_config, backend)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        weight = getattr(child, "weight", None)
        offloaded = isinstance(new_module, SponLinear) and weight is not None and weight.is_meta
        if offloaded or isinstance(new_module, SparseQuantizedLinear):
            # Offloaded, or about to be, or packed: all tensors are where they belong, and have values.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_target(self, target: nn.Module, path: str) -> Any:
        """The quantization backend of a linear, None for an ordinary one; an error for anything else."""
        kind = type(target).__name__
        if isinstance(target, BaseTunerLayer):
            remedy = "Merge or unload the other adapter first."
            raise SponError.of(f"target module {path}", kind, "a linear that no other PEFT method has wrapped", remedy)
        if path in self._read:
            expected = f"a linear that is called: {self._read[path]} multiplies its weight itself"
            raise SponError.of(f"target module {path}", kind, expected, "Leave it out.")
        backend = resolve_quantization_backend(target, **get_quantization_kwargs(self.model))
        if not is_linear(target) and getattr(backend, "layer_type", None) != "linear":
            remedy = "Leave it out of target_modules, or add it to exclude_modules."
            expected = "torch.nn.Linear, Conv1D or a quantized linear"
            raise SponError.of(f"target module {path}", kind, expected, f"It is not supported. {remedy}")
        return backend

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise mixed_batch()
        yield

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            from spon_transformers.quantized_base import pack_again

            pack_again(self.model)
        name = self._check_sparse_layers(adapter_names) if merge else None
        adapter = collect_adapter(self.model, name) if name is not None else None
        unload: Any = super()._unload_and_optionally_merge
        model = unload(merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)
        if adapter is not None:
            from spon_transformers import mark_merged

            mark_merged(model, adapter)
        return model

    def _check_sparse_layers(self, adapter_names: list[str] | None) -> str | None:
        """The adapter that `merge_and_unload` will leave behind; an error, before any change, if it cannot."""
        layers = {path: module for path, module in self.model.named_modules() if isinstance(module, SponLinear)}
        names = sorted(
            {n for layer in layers.values() for n in layer.merged_adapters}
            or set(adapter_names or self.active_adapters)
        )
        name = SponLayer.only_one([n for n in names if n in self.peft_config])
        quantizer = getattr(self.model, "hf_quantizer", None)
        for path, layer in layers.items():
            base = layer.get_base_layer()
            if name not in layer.spon_threshold:
                continue
            weight = weight_of(base)
            plain = isinstance(weight, DenseWeight) and layer.quantization_backend is None
            if not plain and not isinstance(weight, ScaledWeight):
                received = weight.reason if isinstance(weight, Opaque) else type(base).__name__
                expected = "a floating-point linear, or codes by input rows, with scales (int8, int4 or FP8)"
                raise SponError.of(f"merge_and_unload: {path}", received, expected, _NOT_MERGED)
            if not plain and quantizer is not None and not quantizer.is_serializable():
                received = f"a base of {type(quantizer).__name__}"
                raise SponError.of("merge_and_unload", received, "one that transformers can save", _NOT_MERGED)
        return name if name is not None and injected_layers(self.model, name) else None

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, torch.Tensor]:
        # Where PEFT hands over the tensors of any adapter, from disk or hub, right before it loads them.
        check_tensors(config, state_dict, model, adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
