# SPDX-License-Identifier: Apache-2.0
"""``vllm serve ADAPTER_DIR`` and ``SPON_ADAPTER=DIR vllm serve BASE``: engine arguments that mean SPON.

vLLM has no hook between the arguments and the configuration, so `EngineArgs.create_engine_config` is wrapped, as
vLLM's own GGUF plugin wraps it.
"""

from __future__ import annotations

import os
from functools import wraps
from pathlib import Path
from typing import Any

from spon_plugin.adapter.directory import is_adapter, read_config
from spon_plugin.errors import SponError
from spon_vllm import QUANT_METHOD
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
            return original(self, *args, **kwargs)

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
    if not (isinstance(model, str) and is_adapter(model)):
        if os.environ.get(ADAPTER_VARIABLE) and arguments.quantization is None:
            arguments.quantization = QUANT_METHOD
        return None
    if arguments.quantization not in (None, QUANT_METHOD):
        raise SponError.of("--quantization", arguments.quantization, f"{QUANT_METHOD!r}, as the model is an adapter")
    arguments.quantization = QUANT_METHOD
    base = _base_model(model)
    arguments.served_model_name = arguments.served_model_name or [model]
    if arguments.tokenizer == model:
        arguments.tokenizer = None
    arguments.model = base
    return model


def _base_model(adapter: str) -> str:
    base = read_config(adapter)[1].get("base_model_name_or_path")
    remedy = (
        "Serve the base model and name the adapter: vllm serve BASE --quantization spon --hf-overrides "
        f'\'{{"quantization_config": {{"quant_method": "spon", "adapter": "{adapter}"}}}}\''
    )
    if not base:
        raise SponError.of(f"{adapter}: base_model_name_or_path", base, "the base model's name or path", remedy)
    if Path(base).expanduser().is_absolute() and not Path(base).expanduser().is_dir():
        raise SponError.of(f"{adapter}: base_model_name_or_path", base, "a directory that exists", remedy)
    return str(base)
