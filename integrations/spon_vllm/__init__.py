# SPDX-License-Identifier: Apache-2.0
"""SPON in vLLM: ``--quantization spon``, for vLLM 0.20 and later.

vLLM calls `register` by the entry point ``spon`` of the group ``vllm.general_plugins``, in the API server, the engine
and every worker. Importing this package imports neither torch nor vLLM.
"""

from __future__ import annotations

import logging

__all__ = ["register"]

_registered = False


def register() -> None:
    """Make the quantization method ``spon`` known to vLLM; calling it again is harmless.

    It never raises: an exception here would stop every vLLM server of the environment, with SPON or without. If it
    cannot register, it logs why, and vLLM then refuses ``--quantization spon`` as unknown.
    """
    global _registered
    if _registered:
        return
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from spon_plugin.adapter.merged import QUANT_METHOD
        from spon_vllm import engine, metrics
        from spon_vllm.config import SponConfig

        register_quantization_config(QUANT_METHOD)(SponConfig)
        engine.install()
        metrics.install()
        _registered = True
    except Exception:
        logging.getLogger("vllm.spon").exception("The vLLM plugin of spon-plugin cannot be registered")
