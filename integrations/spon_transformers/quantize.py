# SPDX-License-Identifier: Apache-2.0
"""Round a model's linears to 8 or 4 bits and write what compressed-tensors calls pack-quantized.

compressed-tensors owns the format, which transformers and vLLM read without us, and does the arithmetic: its qparams,
its rounding, its packing. It is what llm-compressor is built on, without that package's bounds on transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.decoder.sites import find_sites
from spon_plugin.errors import SponError
from spon_transformers.loading import untie_head

BITS = (8, 4)
# Shares of a group's range that its scale may cover: clipping the largest weights rounds the others less.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded.

    Attributes:
        bits: 8 or 4; others for `round_values` alone.
        group: inputs that share a scale; None for all inputs of an output.
        symmetric: whether the range is as wide below zero as above; otherwise there are zero points.
        head: whether the output head is rounded too. A tied one gets weights of its own.
    """

    bits: int = 4
    group: int | None = 128
    symmetric: bool = True
    head: bool = False

    def check(self) -> None:
        """Raise `SponError` for what can be told without a model."""
        if self.bits not in BITS:
            raise SponError.of("bits", self.bits, "8 or 4")


def check_quantizer() -> None:
    """Raise `SponError` if compressed-tensors is not installed."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise SponError.of(
            "quantize", "no compressed-tensors", "that package", "pip install 'spon-plugin[quantize]'"
        ) from error


@torch.no_grad()
def quantize(model: Any, rounding: Rounding, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Round the linears that an adapter can mask, in place; embeddings, routers, towers and norms stay as they are.

    A scale is the one of `RANGES` with the least squared error in its group, as llm-compressor's observer ``mse``.

    Args:
        model: a dense `PreTrainedModel` with floating-point weights.
        rounding: see `Rounding`.
        progress: called with (linears done, linears).

    Returns:
        The paths of the rounded linears.

    Raises:
        SponError: a field of `rounding` is wrong or does not divide a layer's inputs; or the model is a merged or a
            quantized one. Nothing has been changed then.
    """
    linears = linears_to_round(model, rounding)
    for done, module in enumerate(linears.values()):
        round_linear(module, rounding)
        if progress:
            progress(done + 1, len(linears))
    return list(linears)


def linears_to_round(model: Any, rounding: Rounding) -> dict[str, nn.Linear]:
    """Path -> linear, in the order of the blocks, and the head, if it is to be rounded, with weights of its own.

    Raises:
        SponError: as `quantize`.
    """
    rounding.check()
    if getattr(model, "is_quantized", False):
        raise SponError.of("model", "a quantized model", "floating-point weights", "Start from the model it was.")
    linears: dict[str, Any] = {path: model.get_submodule(path) for site in find_sites(model) for path in site.modules}
    if rounding.head:
        linears |= _head(model)
    _check_fit(linears, rounding.group)
    if rounding.head:
        untie_head(model)
    return linears


@torch.no_grad()
def round_values(model: Any, rounding: Rounding) -> dict[str, int]:
    """As `quantize`, but leave each linear as it is, with the values that its codes would stand for.

    For formats of other bits than `BITS`, which are only measured.

    Returns:
        Path of each linear -> bytes that its scales and zero points would take.

    Raises:
        SponError: as `quantize`.
    """
    from compressed_tensors.quantization import fake_quantize

    linears: dict[str, Any] = {path: model.get_submodule(path) for site in find_sites(model) for path in site.modules}
    _check_fit(linears, rounding.group)
    scheme = scheme_of(rounding).weights
    sizes = {}
    for path, module in linears.items():
        scale, zero = least_error(module.weight, rounding.group, scheme)
        module.weight.copy_(fake_quantize(module.weight, scale, zero, scheme))
        zeros = 0 if rounding.symmetric else -(-scale.numel() * rounding.bits // 8)
        sizes[path] = scale.numel() * scale.element_size() + zeros
    return sizes


def widest_group(model: nn.Module) -> int:
    """The largest group, of 128 and its halves, that divides the inputs of every linear that `quantize` rounds."""
    return _divisor({site.in_features for site in find_sites(model)})


def save_quantized(model: Any, directory: Path) -> None:
    """Write a model that `quantize` has rounded: config, safetensors, and `quantization_config` in `config.json`."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    linears: dict[str, Any] = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    schemes = {path: module.quantization_scheme for path, module in linears.items() if _is_rounded(module)}
    config = QuantizationConfig(
        config_groups={"group_0": next(iter(schemes.values()))},
        ignore=[path for path in linears if path not in schemes],
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    model.save_pretrained(directory)
    ModelCompressor(quantization_config=config).update_config(str(directory))


def bits_per_weight(model: nn.Module) -> float:
    """Bits that a weight of the rounded linears takes in the file, with its share of scales and zero points."""
    rounded: list[Any] = [module for module in model.modules() if _is_rounded(module)]
    names = ("weight_packed", "weight_scale", "weight_zero_point")
    held = [tensor for module in rounded for name in names if (tensor := getattr(module, name, None)) is not None]
    weights = sum(module.in_features * module.out_features for module in rounded)
    return 8 * sum(tensor.numel() * tensor.element_size() for tensor in held) / weights


def scheme_of(rounding: Rounding) -> Any:
    """The `QuantizationScheme` of compressed-tensors."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=rounding.bits,
        symmetric=rounding.symmetric,
        strategy="channel" if rounding.group is None else "group",
        group_size=rounding.group,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")


def _is_rounded(module: nn.Module) -> bool:
    return hasattr(module, "quantization_scheme")


def _head(model: Any) -> dict[str, nn.Module]:
    """The output head by its path."""
    head = model.get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is head), None)
    if not isinstance(head, nn.Linear) or path is None:
        raise SponError.of("head", type(head).__name__, "a model whose head is a torch.nn.Linear", "Leave --head out.")
    return {path: head}


def _check_fit(linears: dict[str, Any], group: int | None) -> None:
    for path, module in linears.items():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise SponError.of(path, type(module).__name__, "a torch.nn.Linear with floating-point weights")
        if group is not None and (group < 1 or module.in_features % group):
            sizes = sorted({linear.in_features for linear in linears.values()})
            expected = "a divisor of every linear's in_features, " + ", ".join(map(str, sizes))
            raise SponError.of("group", group, expected, f"Try {_divisor(sizes)}.")


def _divisor(sizes: Iterable[int]) -> int:
    return next(group for group in (128, 64, 32, 16, 8, 4, 2, 1) if all(size % group == 0 for size in sizes))


def round_linear(module: Any, rounding: Rounding) -> None:
    """Round one linear to the nearest and pack it."""
    scheme = scheme_of(rounding)
    pack(module, scheme, *least_error(module.weight.detach(), rounding.group, scheme.weights))


def pack(module: Any, scheme: Any, scale: Tensor, zero: Tensor) -> None:
    """Put codes in the place of a linear's weight: the nearest ones on the grid.

    Args:
        module: the linear.
        scheme: from `scheme_of`.
        scale: ``[out_features, groups]``.
        zero: likewise.
    """
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import QuantizationStatus, initialize_module_for_quantization

    initialize_module_for_quantization(module, scheme)
    module.weight_scale.data.copy_(scale)
    if not scheme.weights.symmetric:
        module.weight_zero_point.data.copy_(zero)
    module.quantization_status = QuantizationStatus.FROZEN
    compress_module(module)


def least_error(
    weight: Tensor, group: int | None, scheme: Any, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Scales of the least squared error, and zero points.

    Args:
        weight: ``[out_features, in_features]``.
        group: inputs that share a scale; None for all.
        scheme: the arguments of the weights, of `scheme_of`.
        dtype: that scales are kept in; that of the weight by default.

    Returns:
        Each ``[out_features, groups]``.
    """
    from compressed_tensors.quantization import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = weight.unflatten(1, (-1, group or weight.shape[1]))
    low, high = groups.amin(-1), groups.amax(-1)
    best = torch.full(low.shape, torch.inf, device=weight.device)
    scale = zero = torch.zeros_like(low)
    for share in RANGES:
        tried, tried_zero = calculate_qparams(share * low, share * high, scheme)
        tried = tried.to(dtype or weight.dtype).to(weight.dtype)
        error = (fake_quantize(weight, tried, tried_zero, scheme) - weight).float()
        error = error.unflatten(1, groups.shape[1:]).square().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, tried, scale)
        zero = torch.where(better, tried_zero, zero.to(tried_zero.dtype))
    return scale, zero
