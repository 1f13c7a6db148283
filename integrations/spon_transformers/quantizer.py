# SPDX-License-Identifier: Apache-2.0
"""The transformers quantization method "spon": how `from_pretrained` builds a merged model.

`config.json` says which linears are sparse and at which threshold; the weights file holds the folded biases, and the
thresholds per channel and centres of linears that have them (see `spon_plugin.adapter.merged`). The conventions are
those of `transformers/quantizers/quantizer_bitnet.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.adapter.config import CENTER_MODULES, SponFields, short_names
from spon_plugin.adapter.merged import BASE_QUANTIZATION, FIELD, HEAD, QUANT_METHOD, MergedConfig, holds_dense_biases
from spon_plugin.decoder.tokens import rule_of
from spon_plugin.errors import SponError
from spon_plugin.layers.sparse_linear import SparseLayer
from spon_plugin.weights.importers.gptq import holds_zeros_less_one
from spon_plugin.weights.importers.torch_linear import is_plain_matrix
from spon_plugin.weights.linears import is_linear
from spon_transformers.merged_layers import check_files, finish_layers, follow, layer_for, paths_in
from spon_transformers.quick_blocks import quicken

if TYPE_CHECKING:  # while peft is imported, transformers registers us before it can import this
    from transformers import PreTrainedModel


class SponQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` of a merged model.

    Args:
        thresholds: module path -> threshold, for every sparse linear. A float32 survives JSON exactly. None for a
            linear with a threshold per channel, which is in the weights file.
        sparsity: the target of the adapter that was merged.
        tokens: which tokens are masked; see `spon_plugin.SponFields`.
        dense_prefix: the first positions of a sequence that stay dense.
        adapter_digest: of the adapter that was merged; see `spon_plugin.Adapter`.
        format_version: of the adapter's format.
        quant_method: always ``spon``.
        center_modules: which of the linears have a centre in the weights file; see `spon_plugin.Adapter`.
        base_quantization_config: that of the base model, if its weights are quantized; the tensors are as it says.
        head: what the output head is rounded to once it is loaded; see `spon_transformers.head`.

    Raises:
        SponError: a field is missing, unknown or wrong.
    """

    def __init__(
        self,
        thresholds: dict[str, float | None] | None = None,
        sparsity: float = SponFields.sparsity,
        tokens: str = SponFields.tokens,
        dense_prefix: int = 0,
        adapter_digest: str | None = None,
        format_version: int | None = None,
        quant_method: str = QUANT_METHOD,
        center_modules: str | list[str] | None = None,
        base_quantization_config: dict[str, Any] | None = None,
        head: str | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise SponError.of(FIELD, sorted(unknown), "no such fields", "Was it written by another version?")
        if quant_method != QUANT_METHOD:
            raise SponError.of(f"{FIELD}: quant_method", quant_method, repr(QUANT_METHOD))
        self.quant_method: Any = QUANT_METHOD
        self.format_version = format_version
        self.sparsity = sparsity
        self.tokens = tokens
        self.dense_prefix = dense_prefix
        self.adapter_digest = adapter_digest
        self.thresholds = thresholds
        self.center_modules = center_modules or []
        self.base_quantization_config = base_quantization_config
        self.head = head
        self.merged = MergedConfig.of(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` says, without the fields that say nothing."""
        stored: dict[str, Any] = super().to_dict()
        left_out: tuple[tuple[str, Any], ...] = ((CENTER_MODULES, []), (BASE_QUANTIZATION, None), (HEAD, None))
        return {key: value for key, value in stored.items() if key != "merged" and (key, value) not in left_out}


def make_quantizer(config: SponQuantizationConfig, **kwargs: Any) -> HfQuantizer:
    """What `from_pretrained` loads a merged checkpoint with; the arguments are those of `HfQuantizer`."""
    if config.base_quantization_config is None:
        return SponHfQuantizer(config, **kwargs)
    from spon_transformers.quantized_base import around_base

    return around_base(config, **kwargs)


class SponHfQuantizer(HfQuantizer):
    """Puts sparse layers into the skeleton of a model, before transformers fills it with weights."""

    requires_calibration = True
    quantization_config: SponQuantizationConfig
    paths: dict[str, str]
    """Path of each sparse layer in the model -> what `thresholds` calls it."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_kwargs: Any
    ) -> PreTrainedModel:
        self.paths = paths_in(model, self.quantization_config.merged.masks)
        linears = {}
        for path, stored in self.paths.items():
            linears[path] = model.get_submodule(path)
            if not is_linear(linears[path]):
                raise SponError.of(f"{FIELD}: threshold of {stored}", type(linears[path]).__name__, "a linear layer")
        merged = self.quantization_config.merged
        for path, linear in linears.items():
            model.set_submodule(path, layer_for(merged, self.paths[path], linear))
        check_files(merged, self.paths, checkpoint_files or ())
        return model

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        finish_layers(model, self.paths, self.quantization_config.merged)
        model.is_quantized = False  # its weights are ordinary ones: it may be cast and trained
        return model

    def is_serializable(self, **_kwargs: Any) -> bool:
        """Whether the model can be saved: yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: yes, its weights are not quantized."""
        return True


def mark_merged(model: Any, adapter: Adapter) -> None:
    """See `spon_transformers.mark_merged`."""
    from transformers import PreTrainedModel

    from spon_transformers.quantized_base import keep_reversible, settle_decompression

    layers = {path: m for path, m in model.named_modules() if isinstance(m, SparseLayer)}
    for layer in layers.values():
        layer.arrange_for_kernels()
    quicken(model)
    settle_decompression(model)
    rule = rule_of(adapter.fields, model)
    fields = replace(adapter.fields, tokens=rule.tokens, dense_prefix=rule.dense_prefix)
    if not holds_dense_biases(fields):
        for layer in layers.values():
            layer.spon_dense_bias = None
    config = SponQuantizationConfig(
        thresholds={
            path: float(layer.spon_threshold) if layer.spon_threshold.numel() == 1 else None
            for path, layer in layers.items()
        },
        center_modules=short_names((path for path, m in layers.items() if m.spon_center is not None), layers),
        sparsity=fields.sparsity,
        tokens=fields.tokens,
        dense_prefix=fields.dense_prefix,
        adapter_digest=adapter.digest,
        format_version=fields.format_version,
        base_quantization_config=_own_config(model),
    )
    follow(model, config.merged)
    saves: Any = model
    if isinstance(model, PreTrainedModel):
        if config.base_quantization_config is not None:
            keep_reversible(model)
        saves.hf_quantizer = make_quantizer(config)
        saves.config.quantization_config = config
        saves.quantization_method = QUANT_METHOD


def _own_config(model: Any) -> dict[str, Any] | None:
    """`quantization_config` of a base some of whose linears, masked or not, still hold codes."""
    own = getattr(getattr(model, "config", None), "quantization_config", None)
    quantized = [module for module in model.modules() if _holds_codes(module)]
    if own is None or not quantized:
        return None
    stored = dict(own if isinstance(own, dict) else own.to_dict())
    if stored.get("quant_method") == "gptq":
        # Loading may have converted the zero points, and what is saved is what the layers hold.
        held = "gptq" if holds_zeros_less_one(getattr(quantized[0], "host", quantized[0])) else "gptq_v2"
        stored |= {"checkpoint_format": held, "format": held}
    return stored


def _holds_codes(module: Any) -> bool:
    """Whether a linear, of whatever class, has a matrix that is not of floating point."""
    own = (*module._parameters.values(), *module._buffers.values()) if hasattr(module, "in_features") else ()
    return any(tensor is not None and tensor.dim() == 2 and not is_plain_matrix(tensor) for tensor in own)
