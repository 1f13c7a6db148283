# SPDX-License-Identifier: Apache-2.0
"""``vllm serve ADAPTER_DIR`` and ``SPON_ADAPTER=DIR vllm serve BASE``: engine arguments that mean SPON.

vLLM has no hook between the arguments and the configuration, so `EngineArgs.create_engine_config` is wrapped, as
vLLM's own GGUF plugin wraps it.
"""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

from spon_plugin.adapter.base import base_of
from spon_plugin.adapter.directory import is_adapter_name, read_config
from spon_plugin.adapter.merged import QUANT_METHOD
from spon_plugin.errors import SponError
from spon_vllm.settings import ADAPTER_VARIABLE, serving_adapter


def install() -> None:
    """Wrap `EngineArgs.create_engine_config`, once."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if getattr(original, "spon_wrapped", False):
        return

    @wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        with serving_adapter(name_adapter(self)):
            sparse = self.quantization == QUANT_METHOD  # vLLM overwrites it for formats with a method of their own
            config = original(self, *args, **kwargs)
        finish_config(config, sparse)
        return config

    create_engine_config.spon_wrapped = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def name_adapter(arguments: Any) -> str | None:
    """Turn the arguments into those of the base model, where they name an adapter.

    Args:
        arguments: vLLM's `EngineArgs`; changed in place.

    Returns:
        The adapter directory if it was given as the model, else None.

    Raises:
        SponError: the adapter does not say what its base model is, the base has moved, or ``--quantization`` asks for
            something else.
    """
    model = arguments.model
    served = isinstance(model, str) and is_adapter_name(model)
    if not served and not os.environ.get(ADAPTER_VARIABLE):
        return None
    if arguments.quantization not in (None, QUANT_METHOD):
        why = "the model is an adapter" if served else f"{ADAPTER_VARIABLE} names an adapter"
        raise SponError.of("--quantization", arguments.quantization, f"{QUANT_METHOD!r}, as {why}")
    arguments.quantization = QUANT_METHOD
    if not served:
        return None
    base = _base_model(model)
    arguments.served_model_name = arguments.served_model_name or [model]
    if arguments.tokenizer == model:
        arguments.tokenizer = None
    arguments.model = base
    return model


def finish_config(config: Any, sparse: bool) -> None:
    """Check that vLLM has not left the adapter out, and have it look for missing weights as in a dense model.

    vLLM looks for weights that the checkpoint lacks only where no quantization is asked for, or where it is told to.

    Args:
        config: the `VllmConfig`.
        sparse: whether ``--quantization spon`` was asked for.

    Raises:
        SponError: vLLM serves the model by another method.
    """
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from spon_vllm.config import SponConfig
    from spon_vllm.trained import REMEDY, trained_tensors

    method = config.quant_config
    if not isinstance(method, SponConfig):
        if sparse:
            raise SponError.of(
                "--quantization", config.model_config.quantization, f"{QUANT_METHOD!r}, which vLLM has put another for",
                "This kind of checkpoint is read by a method of its own; serve the base in another format.",
            )  # fmt: skip
        return
    settings = method.settings
    if settings is not None and settings.adapter is not None and config.parallel_config.pipeline_parallel_size > 1:
        saved = sorted(trained_tensors(settings.adapter))
        if saved:
            raise SponError.of("modules_to_save", saved[0], "none with --pipeline-parallel-size above 1", REMEDY)
    load = config.load_config
    extra = load.model_loader_extra_config
    # A quantized base may rightly lack tensors that its method makes. Before 0.23 vLLM could not be told.
    plain = method.inner is None and isinstance(extra, dict) and hasattr(DefaultModelLoader, "track_weights_loading")
    if plain and type(get_model_loader(load)) is DefaultModelLoader:
        extra.setdefault("enable_weights_track", True)


def _base_model(adapter: str) -> str:
    remedy = (
        "Serve the base model and name the adapter: vllm serve BASE --quantization spon --hf-overrides "
        f'\'{{"quantization_config": {{"quant_method": "spon", "adapter": "{adapter}"}}}}\''
    )
    return base_of(read_config(adapter)[1], adapter, remedy)
