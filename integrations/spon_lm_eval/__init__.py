# SPDX-License-Identifier: Apache-2.0
"""`lm_eval --model spon-hf`: lm-eval's transformers backend with a SPON adapter on the model.

Importing this package imports neither torch nor lm_eval.
"""

from __future__ import annotations

__all__ = ["MODEL_NAME", "register"]

MODEL_NAME = "spon-hf"
"""What ``lm_eval --model`` calls the backend."""

_TARGET = "spon_lm_eval.model:SponHFLM"


def register() -> None:
    """Make ``--model spon-hf`` known to lm-eval, without importing the class; calling it again is harmless.

    lm-eval's main branch finds the model by its entry-point group ``lm_eval.models``. Releases up to 0.4.13 have no
    plugin loading and are told here, with the kind of placeholder that they keep for their own models.

    Raises:
        RuntimeError: another package has registered that name.
    """
    import lm_eval.models  # noqa: F401  (lm-eval fills a registry by itself only while it is empty)
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=_TARGET)
        return
    found = dict(model_registry.items())[MODEL_NAME]
    path = f"{found.__module__}:{found.__name__}" if isinstance(found, type) else getattr(found, "value", found)
    if path != _TARGET:
        raise RuntimeError(f"{path} is registered as the lm-eval model {MODEL_NAME} already.")
