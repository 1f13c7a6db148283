# SPDX-License-Identifier: Apache-2.0
"""One model's weights in several formats: decoded once to be scored, and what a token reads of each as it is stored."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.decoder.sites import find_sites
from spon_plugin.errors import SponError
from spon_plugin.studies.token_bytes import Stored, TokenBytes, stored_bytes
from spon_plugin.weights import weight_of
from spon_plugin.weights.row_weight import RowWeight
from spon_transformers.gguf_writer import bytes_read, check_kind, write_gguf
from spon_transformers.head import Int8Head, round_head
from spon_transformers.loading import DTYPES, follow_machine, load_model
from spon_transformers.quantize import Rounding, check_quantizer, quantize, round_values, widest_group
from spon_transformers.solver import quantize_for_inputs

FULL = "bf16"
GGUF = "gguf:"
ROUNDED = re.compile(r"int(?P<bits>8|4|3)(-g(?P<group>\d+))?(?P<asymmetric>-asym)?(?P<fit>-fit)?")
"""As `spon quantize` rounds, the head in int8. ``int8`` has a scale for each output, ``int4`` one for each output and
group of 128 inputs, or of half of that and so on where 128 does not divide them; ``-g32`` says groups of 32, ``-asym``
zero points, ``-fit`` that weights are rounded for the inputs that masks leave (``--text``, ``--adapter``): every
mask then has weights of its own. ``int3`` is rounded as ``int4``, for comparison: nothing here runs it."""
VALUES_ONLY = 3  # bits


def rounding_of(name: str, model: Any = None) -> Rounding | None:
    """How a format rounds linears; None for one that `quantize` does not make.

    Args:
        name: of the format.
        model: to be rounded, whose layers say which group divides their inputs; without it there are none.
    """
    found = ROUNDED.fullmatch(name)
    if found is None:
        return None
    bits, group = int(found["bits"]), int(found["group"] or 0) or None
    if group is None and bits < 8 and model is not None:
        group = widest_group(model)
    return Rounding(bits, group, symmetric=found["asymmetric"] is None)


def is_fit(name: str) -> bool:
    """Whether weights in this format are rounded for the masks that they run under."""
    found = ROUNDED.fullmatch(name)
    return found is not None and found["fit"] is not None


def check_format(name: str) -> None:
    """Check the name of a format before work starts.

    Raises:
        SponError: there is none of that name, or the package that makes it is not installed.
    """
    if name.startswith(GGUF):
        check_kind(name.removeprefix(GGUF))
    elif (rounding := rounding_of(name)) is not None and not (is_fit(name) and rounding.bits == VALUES_ONLY):
        check_quantizer()
    elif name != FULL:
        expected = (
            f"{FULL}, int8, int4, int3 (each with -g32 and -asym, the first two with -fit), or gguf: and a kind of "
            "llama.cpp's as gguf:Q4_K_M"
        )
        raise SponError.of("format", name, expected)


def is_masked(name: str) -> bool:
    """Whether linears in this format can skip rows.

    Those in k-quants, which share blocks along the inputs, cannot; and there is no kernel for three bits.
    """
    rounding = rounding_of(name)
    return not name.startswith(GGUF) and (rounding is None or rounding.bits != VALUES_ONLY)


def load_format(
    name: str,
    format: str,
    adapter: Adapter | None = None,
    windows: Tensor | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Stored:
    """Load a model, round its weights to a format and decode them again.

    Args:
        name: of the model, as for `load_model`.
        format: see `check_format`. ``bf16`` is the model in bfloat16, which all others are made from.
        adapter: that it will run under, for one that `is_fit`; None for none.
        windows: token ids ``[count, length]`` for one that `is_fit`.
        dtype: to compute in, of `loading.DTYPES`; ``auto`` follows the machine.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        The model in that dtype, and what a token reads of the stored one.

    Raises:
        SponError: see `check_format`, `load_model` and `quantize`; a model that the format cannot hold.
    """
    check_format(format)
    computing = DTYPES[dtype]
    model = load_model(name, "bfloat16", trust_remote_code=trust_remote_code)
    if format.startswith(GGUF):
        with TemporaryDirectory() as directory:
            file = write_gguf(model, Path(directory, "model.gguf"), format.removeprefix(GGUF))
            size, weights = bytes_read(file)
            dense = load_model(str(file), "float32")
            return Stored(dense.to(computing) if computing else follow_machine(dense), TokenBytes({}, size, weights))
    sites = find_sites(model)
    rounding = rounding_of(format, model)
    scales: dict[str, int] = {}
    if rounding is not None and rounding.bits == VALUES_ONLY:
        scales = round_values(model, rounding)
    elif rounding is not None and is_fit(format):
        assert windows is not None
        quantize_for_inputs(model, rounding, windows, adapter)
    elif rounding is not None:
        quantize(model, rounding)
    if rounding is not None:
        round_head(model, "int8")
    held = stored_bytes(model, sites)
    if scales and rounding is not None:
        codes = {path: -(-size * rounding.bits // 16) for path, size in held.codes.items()}  # of those in bfloat16
        held = replace(held, codes=codes, rest=held.rest + sum(scales.values()))
    model = decoded(model)
    return Stored(model.to(computing) if computing else follow_machine(model), held)


@torch.no_grad()
def decoded(model: Any) -> Any:
    """Put linears in floating point, with the values of the codes, in the place of packed ones; in place.

    Args:
        model: of `load_format`'s own making.

    Returns:
        The same model, in float32 if a linear was packed.
    """
    packed = {path: module for path, module in model.named_modules() if _is_packed(module)}
    if not packed:
        return model
    for path, module in packed.items():
        weight = module.row_weight if isinstance(module, Int8Head) else weight_of(module)
        assert isinstance(weight, RowWeight)
        linear = nn.Linear(weight.in_features, weight.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.dense(torch.float32).t().contiguous(), requires_grad=False)
        bias: Tensor | None = getattr(module, "bias", None)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
        model.set_submodule(path, linear)
    return model.float()


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, Int8Head) or hasattr(module, "weight_packed")
