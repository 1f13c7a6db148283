# SPDX-License-Identifier: Apache-2.0
"""Merged checkpoints on a quantized base: its own quantizer loads its tensors, and ours goes around it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer

from spon_plugin.adapter.mask import CENTER, THRESHOLD
from spon_plugin.adapter.merged import DENSE_BIAS
from spon_plugin.layers.sparse_linear import SparseLayer
from spon_plugin.layers.sparse_quantized import QuantizedLayer, SparseQuantizedLinear, sparse_layer
from spon_plugin.weights.linears import is_linear, linear_features, weight_of
from spon_plugin.weights.scaled import ScaledWeight
from spon_transformers import gguf
from spon_transformers.merged_layers import check_files, finish_layers, paths_in


def around_base(config: Any, **kwargs: Any) -> HfQuantizer:
    """The quantizer of a merged checkpoint's base, which puts sparse layers around what it has loaded.

    Args:
        config: the checkpoint's `SponQuantizationConfig`.
        **kwargs: for the base's quantizer.
    """
    stored = dict(config.base_quantization_config)
    quantizer: Any
    if stored.get("quant_method") == gguf.METHOD:  # transformers knows it of `.gguf` files alone
        quantizer = gguf.GgufBlocksQuantizer(gguf.GgufBlocksConfig(**stored), pre_quantized=True)
    else:
        quantizer = AutoHfQuantizer.from_config(AutoQuantizationConfig.from_dict(stored), **kwargs)
    cls: Any = type(quantizer)
    quantizer.__class__ = _class_around(cls)
    quantizer.spon_config = config
    return quantizer


@cache
def _class_around(own: type[HfQuantizer]) -> Any:
    return type(f"Spon{own.__name__}", (_Around, own), {})


class _Around(HfQuantizer):
    """What comes before and after the steps of the base's own quantizer, the next class in line."""

    spon_config: Any
    paths: dict[str, str]
    host_runs: bool = True
    """Whether the base's own linears run on this machine."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """See `HfQuantizer.validate_environment`; codes stay, where the base's quantizer would decode them all.

        So it does with FP8 on a machine without a GPU.
        """
        config: Any = self.quantization_config
        wanted = getattr(config, "dequantize", False)
        super().validate_environment(*args, **kwargs)
        if getattr(config, "dequantize", False) and not wanted:
            config.dequantize, self.host_runs = False, False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        result = super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)
        merged = self.spon_config.merged
        self.paths = paths_in(model, merged.masks)
        for path, entry in self.paths.items():
            # Whatever it is by now: some quantizers put their tensors into the linears of torch, or leave some alone.
            _announce(model.get_submodule(path), merged.tensors(entry), model.dtype)
        check_files(merged, self.paths, checkpoint_files or ())
        return result

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Finish the model, as `HfQuantizer.postprocess_model`; its config is the merged checkpoint's."""
        result = super().postprocess_model(model, **kwargs)
        keep_reversible(model)
        model.config.quantization_config = self.spon_config
        return result

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        result = super()._process_model_after_weight_loading(model, **kwargs)
        undo_offloading(model)
        for path in self.paths:
            model.set_submodule(path, sparse_layer(model.get_submodule(path), path))
        if not self.host_runs:
            others = [path for path, module in model.named_modules() if is_quantized(module)]
            for path in others:
                model.set_submodule(path, SparseQuantizedLinear(model.get_submodule(path)))
        finish_layers(model, self.paths, self.spon_config.merged)
        settle_decompression(model)
        return result


def settle_decompression(model: Any) -> None:
    """See to what compressed-tensors does at a model's first pass: it decompresses the linears that are not ours.

    Where there are none, that is not to be done; else it offloads the whole model for it: see `undo_offloading`.
    """
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is None:
        return
    if not any(hasattr(module, "quantization_scheme") for module in model.modules()):
        hook.remove()
        del model.ct_decompress_hook
        return

    def undo(module: nn.Module, _args: Any) -> None:
        undo_offloading(module)
        own.remove()

    own = model.register_forward_pre_hook(undo)


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a linear of a host with codes by input rows, none of ours."""
    return is_linear(module) and not isinstance(module, SparseLayer) and isinstance(weight_of(module), ScaledWeight)


def keep_reversible(model: Any) -> None:
    """Let `save_pretrained` write a loaded model whose base's quantizer makes its weights of several tensors.

    transformers would undo what it did to the tensors of a file, and has no way to undo that. There is nothing to undo:
    the state dict of such weights (bitsandbytes, torchao) has the tensors of the file.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [conversion for conversion in conversions if _is_reversible(conversion)]


def _is_reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def pack_again(model: nn.Module) -> None:
    """Pack the linears of a model that compressed-tensors has decompressed, as it does before a model's first pass.

    The values are those that the codes stood for, so the codes are the same: in float32, as dividing in bfloat16 would
    move some of eight bits. Other models stay as they are.
    """
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    status = getattr(getattr(compressor, "quantization_config", None), "quantization_status", None)
    if compressor is not None and getattr(status, "value", "") == "decompressed":
        for module in model.modules():
            if getattr(getattr(module, "quantization_status", None), "value", "") == "decompressed":
                module.weight.data = module.weight.data.float()
        # compressed-tensors 0.17, which vLLM 0.32 asks for, has no such argument, and no layers to skip here.
        skips = "skip_compressed" in signature(compressor.compress_model).parameters
        compressor.compress_model(model, **({"skip_compressed": True} if skips else {}))
    undo_offloading(model)


def undo_offloading(model: nn.Module) -> None:
    """Take compressed-tensors' offloading off modules whose tensors lie where they are used.

    It keeps a model's tensors behind mappings that move them at every look, and a forward of its own in every module,
    which moves the arguments: a small model's token takes twice as long for it, also where there is nothing to move.
    """
    wrapped: list[Any] = [module for module in model.modules() if hasattr(module._parameters, "onload_device")]
    if not wrapped:
        return
    from compressed_tensors.offload.module import remove_module_offload

    for module in wrapped:
        devices = {str(module._parameters.onload_device), str(module._parameters.offload_device)}
        if len(devices) == 1:
            remove_module_offload(module)
            if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
                del module.forward  # what it puts back is the class's own
            if isinstance(module, QuantizedLayer):
                module.host._parameters, module.host._buffers = module._parameters, module._buffers


def _announce(host: nn.Module, tensors: Sequence[str], dtype: torch.dtype) -> None:
    """Make room in a quantized linear for what the file holds beside its own tensors."""
    in_features, out_features = linear_features(host)
    device = next(chain(host.parameters(), host.buffers())).device
    room: dict[str, torch.Tensor | None] = {name: None for name in (THRESHOLD, CENTER, DENSE_BIAS)}
    room[THRESHOLD] = torch.zeros(1, dtype=torch.float32, device=device)  # for all inputs, and the config says it
    for name in tensors:
        size, kind = (out_features, dtype) if name == DENSE_BIAS else (in_features, torch.float32)
        room[name] = torch.zeros(size, dtype=kind, device=device)
    for name, tensor in room.items():
        host.register_buffer(name, tensor)
    if getattr(host, "bias", None) is None:
        host.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
