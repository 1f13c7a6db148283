# SPDX-License-Identifier: Apache-2.0
"""Load one model at several precisions, to compare what masks and alphas do on each."""

from __future__ import annotations

import logging
from typing import Any

import torch

from spon_plugin.errors import SponError
from spon_transformers.loading import DTYPES, load_model, model_source

FLOATS = tuple(name for name in DTYPES if name != "auto")
BNB = ("int8", "int4")
PRECISIONS = (*FLOATS, *BNB)


def check_precision(precision: str) -> None:
    """Check a precision before work starts.

    Raises:
        SponError: it is unknown, or the package that quantizes to it is not installed.
    """
    if precision not in PRECISIONS:
        raise SponError.of("precision", precision, "one of " + ", ".join(PRECISIONS))
    if precision in BNB:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise SponError.of("precision", precision, "bitsandbytes installed", "pip install bitsandbytes") from error


def load_precision(name: str, precision: str, dtype: str = "float32") -> Any:
    """Load a causal language model with its linears at some precision.

    ``int8`` and ``int4`` are bitsandbytes' LLM.int8() and NF4 (blocks of 64); the output head, norms and embeddings
    stay in `dtype`, in which 4-bit layers compute, too.

    Args:
        name: as for `load_model`; not GGUF for a quantized precision.
        precision: one of `PRECISIONS`.
        dtype: of what is not quantized; ignored for a floating-point precision.

    Returns:
        A `PreTrainedModel` in eval mode, without gradients, whose linears have one for their input.

    Raises:
        SponError: see `check_precision` and `load_model`.
    """
    check_precision(precision)
    if precision in FLOATS:
        return load_model(name, precision)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = model_source(name)
    if source.gguf_file:
        raise SponError.of("model", name, "a transformers directory or hub name to quantize", "Convert the GGUF first.")
    if precision == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[dtype] or torch.float32
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a warning per layer and pass about float16
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.name, dtype=DTYPES[dtype] or "auto", quantization_config=config
        )
    except (OSError, ValueError) as error:
        raise SponError.of("model", name, f"a causal language model that can be quantized ({error})") from error
    module: Any
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights for an inference kernel of some CPUs at the first pass without gradients;
        # that kernel has no backward pass, computes in bfloat16 and takes some shapes only.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False)


def weight_bytes(model: Any) -> int:
    """Bytes of parameters and buffers, packed as they are."""
    return int(model.get_memory_footprint())
