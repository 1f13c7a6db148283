# SPDX-License-Identifier: Apache-2.0
"""`SponConfig`: the quantization method ``spon`` as vLLM sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import vllm.envs as envs
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from spon_plugin.adapter.directory import read_adapter
from spon_plugin.adapter.mask import Mask
from spon_plugin.adapter.merged import QUANT_METHOD, Announced
from spon_plugin.errors import SponError
from spon_plugin.kernels.triton.launch import LEAST_CAPABILITY
from spon_plugin.machine import DTYPES
from spon_vllm import hosts
from spon_vllm.checks import check_centers, check_fit, check_shards, is_left_dense
from spon_vllm.head import method_for
from spon_vllm.linear import SponLinearMethod
from spon_vllm.report import Coverage
from spon_vllm.settings import Settings, resolve
from spon_vllm.trained import TrainedEmbeddingMethod, trained_tensors

logger = init_logger("vllm.spon")


class SponConfig(QuantizationConfig):
    """Sparsifies the linears that an adapter names, around whatever computes them otherwise.

    vLLM makes one from `quantization_config` in the process that parses the arguments, completes it with
    `maybe_update_config`, and sends it to the workers by pickle; so it holds no tensors until a worker asks.

    Args:
        given: `quantization_config` of the checkpoint or from ``--hf-overrides``; None for neither.
    """

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.given = dict(given or {})
        self.settings: Settings | None = None
        self.inner: Any = None
        self._names: dict[str, str] | None = None
        self._renames: Any = None
        self._trained: dict[str, dict[str, Tensor]] | None = None
        self._masks: dict[str, Mask | Announced] | None = None
        self.coverage = Coverage()

    def __repr__(self) -> str:
        return f"SponConfig({self.settings or self.given})"

    @classmethod
    def get_name(cls) -> str:
        """The method's name."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes of activations: our kernels', which compute the layers whose base's own method takes fewer."""
        return list(DTYPES.values())

    @classmethod
    def get_min_capability(cls) -> int:
        """That of the GPU kernels."""
        major, minor = LEAST_CAPABILITY
        return 10 * major + minor

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file of its own: `config.json` or the adapter says everything."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SponConfig:
        """From `quantization_config`, which may be the base model's own."""
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take over where the user asks for it: the base's own quantization becomes the inner method."""
        return QUANT_METHOD if user_quant == QUANT_METHOD else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Find the adapter, check that it fits, and write what was found where vLLM's compile cache looks.

        Args:
            model_name: the base model or the merged checkpoint.
            hf_config: its configuration; its `quantization_config` is replaced.
            revision: of the model, on the hub.

        Raises:
            SponError: there is no adapter, it does not fit, or the server is to be batch-invariant, which sparse steps
                are not; the message says what to do.
        """
        if envs.VLLM_BATCH_INVARIANT:
            raise SponError.of(
                "VLLM_BATCH_INVARIANT",
                "1",
                "0 with --quantization spon: what a sparse step skips, and in what order it sums up, depends on the "
                "other requests in it",
                "Unset it, or serve the base model without the adapter.",
            )
        self.settings, merged = resolve(self.given, _stored(model_name, revision))
        if self.settings.base_quantization is not None:
            self.inner = _inner_config(dict(self.settings.base_quantization), hf_config)
            self.inner.maybe_update_config(model_name, hf_config=hf_config, revision=revision)
        if hf_config is not None:
            check_fit(self.settings, hf_config, model_name)
            hf_config.quantization_config = self.settings.as_config(merged)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename modules as the model in vLLM names them."""
        renames = hf_to_vllm_mapper
        if getattr(renames, "orig_to_new_stacked", None):
            # Some versions pass what puts q_proj into qkv_proj, too; thresholds are looked up by the names before that.
            renames = dataclasses.replace(renames, orig_to_new_stacked={})
        self._names, self._renames = renames.apply_dict(self.names), renames
        self._masks = self._trained = None
        if self.inner is not None:
            self.inner.apply_vllm_mapper(hf_to_vllm_mapper)

    @property
    def names(self) -> dict[str, str]:
        """The module's path in vLLM -> its path in the adapter."""
        if self._names is None:
            assert self.settings is not None, "maybe_update_config has not been called"
            self._names = {module: module for module in self.settings.modules}
        return self._names

    @property
    def masks(self) -> dict[str, Mask | Announced]:
        """The module's path in vLLM -> its mask; of a merged checkpoint, what its config says. Read once a worker."""
        if self._masks is None:
            settings = self.settings
            assert settings is not None, "maybe_update_config has not been called"
            adapter = None if settings.adapter is None else read_adapter(settings.adapter)
            own: Mapping[str, Mask | Announced] = settings.announced if adapter is None else adapter.masks
            self._masks = {name: own[module] for name, module in self.names.items()}
        return self._masks

    @property
    def trained(self) -> dict[str, dict[str, Tensor]]:
        """The module's path in vLLM -> the tensors that the adapter has trained as a whole; read once in a worker."""
        if self._trained is None:
            assert self.settings is not None, "maybe_update_config has not been called"
            adapter = self.settings.adapter
            own = {} if adapter is None else trained_tensors(adapter)
            self._trained = own if self._renames is None else self._renames.apply_dict(own)
        return self._trained

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method for one layer: sparse around the inner method where the adapter says so.

        Raises:
            SponError: the adapter covers a fused layer in part, or with several centres; has trained a head that the
                base has quantized; or leaves layers to the base's own method, which does not take this dtype.
        """
        inner = self._inner_method(layer, prefix)
        if prefix in self.trained:
            if not isinstance(inner, UnquantizedEmbeddingMethod | None):
                raise SponError.of("modules_to_save", prefix, f"none, as the base has it in {type(inner).__name__}")
            self.coverage.trained.add(prefix)
            inner = TrainedEmbeddingMethod(self.trained[prefix])
        if not isinstance(layer, LinearBase):
            rounds = self.settings is not None and self.settings.head is not None
            return method_for(layer, inner, self.coverage) if rounds else inner
        parent, _, leaf = prefix.rpartition(".")
        shards = list(self.packed_modules_mapping.get(leaf, [leaf]))
        paths = [f"{parent}.{shard}" if parent else shard for shard in shards]
        covered = [path for path in paths if path in self.masks]
        if not covered or is_left_dense(prefix):
            reason = hosts.dtype_objection(self.inner, inner, layer.params_dtype)
            if reason:
                raise SponError.of(
                    "--dtype", f"{prefix} in {layer.params_dtype}", f"one of its own method, {reason}",
                    "Serve in another dtype, or an adapter that names every linear.",
                )  # fmt: skip
            return inner
        check_shards(self.masks, leaf, shards)
        masks = [self.masks[path] for path in paths]
        check_centers({p: m.center for p, m in zip(paths, masks, strict=True) if isinstance(m, Mask)}, leaf)
        assert self.settings is not None
        return SponLinearMethod(inner, paths, masks, self.settings, self.coverage)

    def _inner_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if self.inner is not None:
            self.inner.packed_modules_mapping = self.packed_modules_mapping
            return self.inner.get_quant_method(layer, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def get_cache_scale(self, name: str) -> str | None:
        """The inner method's name of a key-value scale (vLLM up to 0.2x asks for each tensor)."""
        return self.inner.get_cache_scale(name) if hasattr(self.inner, "get_cache_scale") else None

    def get_cache_scale_mapper(self) -> Any:
        """The inner method's mapping of key-value scales (later versions of vLLM)."""
        source: Any = self.inner if self.inner is not None else super()
        return source.get_cache_scale_mapper()

    def get_checkpoint_weight_mapper(self) -> Any:
        """The inner method's mapping of tensors (vLLM 0.3x)."""
        source: Any = self.inner if self.inner is not None else super()
        return source.get_checkpoint_weight_mapper()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_masks": None, "_trained": None}


def _stored(model_name: str, revision: str | None) -> dict[str, Any] | None:
    """`quantization_config` in the model's own `config.json`, before any override."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(model_name, revision=revision)
    except Exception as error:  # no such file: formats of vLLM's own, cloud storage
        logger.debug("SPON: %s has no config.json to look into: %s", model_name, error)
        return None
    stored = config.get("quantization_config")
    return stored if isinstance(stored, dict) else None


def _inner_config(base: dict[str, Any], hf_config: Any) -> Any:
    """The base's own quantization, chosen as vLLM's `ModelConfig._verify_quantization` chooses it.

    Raises:
        SponError: the base is in a format that vLLM reads by a loader of its own, chosen by ``--quantization``.
    """
    name = base["quant_method"]
    if name == "bitsandbytes":
        raise SponError.of(
            "the base model's quant_method",
            name,
            "a format that vLLM's default loader reads, such as compressed-tensors, GPTQ, AWQ or FP8",
            "Serve the base in its own precision or another format; the adapter fits any of them.",
        )
    for method in QUANTIZATION_METHODS:
        if method == QUANT_METHOD:
            continue
        override = get_quantization_config(method).override_quantization_method(base, None, hf_config=hf_config)
        if override is not None:
            name = override
            break
    return get_quantization_config(name).from_config(base)
