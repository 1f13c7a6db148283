# SPDX-License-Identifier: Apache-2.0
"""Load one model at several precisions, to compare what masks and alphas do on each."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import Any

import torch

from spon_plugin import machine
from spon_plugin.errors import SponError
from spon_transformers.loading import DTYPES, best_device, load_model, model_source, refused, whole_model

FLOATS = tuple(machine.DTYPES)
BNB = ("int8", "int4")
TORCHAO = ("torchao-int8", "torchao-int4")
QUANTIZED = (*BNB, *TORCHAO)
PRECISIONS = (*FLOATS, *QUANTIZED)
_GROUP = 32


def check_precision(precision: str) -> None:
    """Check a precision before work starts.

    Raises:
        SponError: it is unknown, or the package that quantizes to it is not installed.
    """
    if precision not in PRECISIONS:
        raise SponError.of("precision", precision, "one of " + ", ".join(PRECISIONS))
    for names, package in ((BNB, "bitsandbytes"), (TORCHAO, "torchao")):
        if precision in names:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise SponError.of("precision", precision, f"{package} installed", f"pip install {package}") from error


def check_precisions(precisions: Sequence[str]) -> None:
    """Check the precisions of a comparison: a floating-point one first.

    Raises:
        SponError: that one is not, or `check_precision` refuses one.
    """
    if not precisions or precisions[0] not in FLOATS:
        raise SponError.of("precisions", list(precisions), f"a full precision first: {', '.join(FLOATS)}")
    for precision in precisions:
        check_precision(precision)


def load_precision(name: str, precision: str, dtype: str = "float32", trust_remote_code: bool = False) -> Any:
    """Load a causal language model with its linears at some precision.

    ``int8`` and ``int4`` are bitsandbytes' LLM.int8() and NF4 (blocks of 64); ``torchao-int8`` and ``torchao-int4``
    are torchao's weight-only integers, symmetric, with a scale per output and per group of 32 inputs. The output head,
    norms and embeddings stay in `dtype`, in which 4-bit layers compute, too.

    Args:
        name: as for `load_model`; not GGUF for a quantized precision.
        precision: one of `PRECISIONS`.
        dtype: of what is not quantized; ignored for a floating-point precision. ``auto`` is that of `load_model`.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        A `PreTrainedModel` in eval mode, without gradients, whose linears have one for their input.

    Raises:
        SponError: see `check_precision` and `load_model`.
    """
    check_precision(precision)
    if precision in FLOATS:
        return load_model(name, precision, trust_remote_code=trust_remote_code)
    from transformers import AutoConfig

    source = model_source(name)
    if source.gguf_file:
        raise SponError.of("model", name, "a transformers directory or hub name to quantize", "Convert the GGUF first.")
    config = _config(precision, DTYPES[dtype] or torch.float32)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a warning per layer and pass about float16
    try:
        trust = {"trust_remote_code": trust_remote_code}
        rest: Any = DTYPES[dtype] or AutoConfig.from_pretrained(source.name, **trust).dtype or "auto"
        if dtype == "auto" and isinstance(rest, torch.dtype):
            rest = machine.compute_dtype(rest, best_device())
        model = whole_model(source, dtype=rest, quantization_config=config, **trust)
    except Exception as error:
        groups = f", all in_features divisible by {_GROUP}" if precision == "torchao-int4" else ""
        raise refused(name, f"a causal language model that can be quantized{groups}", error) from error
    module: Any
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights for an inference kernel of some CPUs at the first pass without gradients;
        # that kernel has no backward pass, computes in bfloat16 and takes some shapes only.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False)


def _config(precision: str, dtype: torch.dtype) -> Any:
    """What transformers quantizes by."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision == "int4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if precision == "torchao-int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    # Int4WeightOnlyConfig packs for GPUs only.
    four: torch.dtype = torch.int4  # type: ignore[attr-defined]
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=four, granularity=PerGroup(_GROUP)))


def weight_bytes(model: Any) -> int:
    """Bytes of parameters and buffers with their scales, as they lie; torchao keeps 4 bits in a byte on a CPU."""
    kept = [part for tensor in (*model.parameters(), *model.buffers()) for part in _parts(tensor)]
    # bitsandbytes' 8-bit scales move from the weight to the layer at the first pass.
    kept += [module.state.SCB for module in model.modules() if hasattr(getattr(module, "state", None), "SCB")]
    return sum(part.nbytes for part in kept if isinstance(part, torch.Tensor))


def _parts(tensor: torch.Tensor) -> list[Any]:
    """What a weight is made of: torchao's are tensor subclasses, bitsandbytes' carry their scales along."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(tensor, name))]
    state = getattr(tensor, "quant_state", None)
    return [tensor, getattr(tensor, "SCB", None), getattr(state, "absmax", None), getattr(state, "code", None)]
