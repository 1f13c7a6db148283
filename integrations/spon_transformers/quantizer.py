# SPDX-License-Identifier: Apache-2.0
"""The transformers quantization method "spon": how `from_pretrained` builds a merged model.

`config.json` says which linears are sparse and at which threshold; the weights file holds the folded biases, and the
thresholds per channel and centres of linears that have them (see `spon_plugin.adapter.merged`). The conventions are
those of `transformers/quantizers/quantizer_bitnet.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spon_plugin.adapter.config import CENTER_MODULES, SponFields, short_names
from spon_plugin.adapter.directory import Adapter
from spon_plugin.adapter.merged import FIELD, QUANT_METHOD, MergedConfig, holds_dense_biases
from spon_plugin.decoder.tokens import follow_tokens, rule_of
from spon_plugin.errors import SponError
from spon_plugin.layers.sparse_linear import SparseConv1D, SparseLinear, sparse_like
from spon_plugin.weights.linears import is_linear, linear_features

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
        self.merged = MergedConfig.of(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` says; `center_modules` only where there are centres."""
        stored: dict[str, Any] = super().to_dict()
        return {key: value for key, value in stored.items() if key != "merged" and (key, value) != (CENTER_MODULES, [])}


class SponHfQuantizer(HfQuantizer):
    """Puts sparse layers into the skeleton of a model, before transformers fills it with weights."""

    requires_calibration = True
    quantization_config: SponQuantizationConfig
    paths: dict[str, str]
    """Path of each sparse layer in the model -> what `thresholds` calls it."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_kwargs: Any
    ) -> PreTrainedModel:
        self.paths = _paths_in(model, self.quantization_config.merged.masks)
        linears = {}
        for path, stored in self.paths.items():
            linears[path] = model.get_submodule(path)
            if not is_linear(linears[path]):
                raise SponError.of(f"{FIELD}: threshold of {stored}", type(linears[path]).__name__, "a linear layer")
        for path, linear in linears.items():
            model.set_submodule(path, self._layer_for(self.paths[path], linear))
        self._check_files(linears, checkpoint_files or ())
        return model

    def _check_files(self, linears: Iterable[str], files: Sequence[str]) -> None:
        """See that the weights file has the tensors that the config speaks of; transformers would make them up."""
        safetensors = [file for file in files if str(file).endswith(".safetensors")]
        if not safetensors or len(safetensors) != len(files):
            return
        stored: set[str] = set()
        for file in safetensors:
            with safe_open(file, framework="pt") as tensors:
                stored.update(key for key in tensors.keys() if ".spon_" in key)  # noqa: SIM118 (not a dict)
        for path in linears:
            entry = self.paths[path]
            for name in self.quantization_config.merged.tensors(entry):
                names = (f".{path}.{name}", f".{entry}.{name}")
                # A file of the backbone alone has shorter paths than the model around it, and the other way round.
                if not any(f".{key}".endswith(names) or names[0].endswith(f".{key}") for key in stored):
                    raise SponError.of(f"{path}.{name}", "no such tensor", f"one, as {FIELD} has it", "Merge again.")

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        for path, entry in self.paths.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, SparseLinear | SparseConv1D)
            announced, device = self.quantization_config.merged.masks[entry], layer.spon_threshold.device
            vectors = {name: getattr(layer, name) for name in announced.vectors}
            layer.spon_threshold = announced.mask(path, linear_features(layer)[0], vectors).threshold.to(device)
            layer.arrange_for_kernels()
        _follow(model, self.quantization_config)
        model.is_quantized = False  # its weights are ordinary ones: it may be cast and trained
        return model

    def _layer_for(self, path: str, linear: nn.Module) -> nn.Module:
        layer, merged = sparse_like(linear), self.quantization_config.merged
        for name in merged.masks[path].vectors:
            setattr(layer, name, layer.spon_threshold.new_zeros(linear_features(linear)[0]))
        if merged.has_dense_biases:
            layer.keep_dense_bias()
        return layer

    def is_serializable(self, **_kwargs: Any) -> bool:
        """Whether the model can be saved: yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: yes, its weights are not quantized."""
        return True


def _paths_in(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Where a model has the layers of a checkpoint, by their paths in it -> as they are stored.

    `AutoModel` makes the backbone alone, without the prefix that its paths have in a model with a head; and the other
    way round. A sparse head is no part of the backbone.

    Raises:
        SponError: the model has no such layer.
    """
    prefix = model.base_model_prefix + "."
    is_backbone = model.base_model is model
    modules = {path for path, _ in model.named_modules()}
    found = {}
    for path in stored:
        candidates = (path, path.removeprefix(prefix), prefix + path)
        here = next((candidate for candidate in candidates if candidate in modules), None)
        if here is not None:
            found[here] = path
        elif path.startswith(prefix) or not is_backbone:
            field = f"{FIELD}: threshold of {path}"
            raise SponError.of(field, "a layer that is missing", f"a layer of {type(model).__name__}")
    return found


def mark_merged(model: Any, adapter: Adapter) -> None:
    """See `spon_transformers.mark_merged`."""
    from transformers import PreTrainedModel

    layers = {path: m for path, m in model.named_modules() if isinstance(m, SparseLinear | SparseConv1D)}
    for layer in layers.values():
        layer.arrange_for_kernels()
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
    )
    _follow(model, config)
    saves: Any = model
    if isinstance(model, PreTrainedModel):
        saves.config.quantization_config = config
        saves.hf_quantizer = SponHfQuantizer(config)
        saves.quantization_method = QUANT_METHOD


def _follow(model: nn.Module, config: SponQuantizationConfig) -> None:
    rule = rule_of(config.merged.fields, model)
    if rule.leaves_any:
        follow_tokens(model, rule)
