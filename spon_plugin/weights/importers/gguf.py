# SPDX-License-Identifier: Apache-2.0
"""GGUF (llama.cpp): blocks along the inputs of each output, from a file or in transformers' `GgufLinear`.

What fits exactly keeps its bits or takes the next wider format: Q8_0 as int8 in groups of 32; Q4_0, Q4_1 and Q4_K as
int4 in groups of 32; Q5_0, Q5_1 and Q5_K as int8 in groups of 32, Q6_K as int8 in groups of 16; floats as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.errors import SponError
from spon_plugin.weights.dense import DenseWeight
from spon_plugin.weights.importers.kind import Kind, Unreadable, named_features
from spon_plugin.weights.int4 import Int4Weight, pack_nibbles
from spon_plugin.weights.int8 import Int8Weight
from spon_plugin.weights.row_weight import RowWeight
from spon_plugin.weights.scaled import ScaledWeight


def gguf_weight(blocks: Tensor, ggml_type: int, in_features: int, name: str = "weight") -> RowWeight:
    """A weight in GGUF's blocks.

    Args:
        blocks: uint8 ``[out_features, bytes of a row]``. A file has the outputs in an order that, for the query and key
            of some architectures, is not that of transformers.
        ggml_type: llama.cpp's number of the type; `gguf.ReaderTensor.tensor_type` of a file's tensor.
        in_features: of the weight.
        name: of the tensor, for the error.

    Raises:
        SponError: the type has no exact counterpart.
    """
    if ggml_type in _FLOATS:
        return DenseWeight(blocks.view(_FLOATS[ggml_type]).t())
    if ggml_type not in _BLOCKS:
        known = ", ".join(kind for kind, _, _ in _BLOCKS.values())
        remedy = "Convert it with llama-quantize, or load it with transformers, which decodes it."
        raise SponError.of(f"{name}: type", int(ggml_type), f"floats or one of {known}", remedy)
    _, size, decode = _BLOCKS[ggml_type]
    return decode(blocks.unflatten(1, (in_features // size, -1)))


def _matches(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    blocks = isinstance(weight, Tensor) and weight.dtype == torch.uint8 and weight.dim() == 2
    return blocks and hasattr(module, "ggml_type") and hasattr(module, "in_features")


def _weight(module: Any) -> RowWeight | Unreadable:
    """Of transformers' `GgufLinear`, which may take its inputs in another order."""
    if module.ggml_type not in _BLOCKS:
        return Unreadable(f"GGUF blocks of type {module.ggml_type}")
    found, order = gguf_weight(module.weight.data, module.ggml_type, module.in_features), module.input_permutation
    if order is None:
        return found
    assert isinstance(found, ScaledWeight)
    place = order.argsort()
    return replace(found, codes=found.codes[place], group_of_row=found.groups[place].to(torch.int32))


def _half(blocks: Tensor) -> Tensor:
    """Two bytes at the end of each block as one float32: ``[out, blocks]``."""
    return blocks.contiguous().view(torch.float16).squeeze(-1).float()


def _grouped(codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, middle: int) -> RowWeight:
    """A weight of blocks.

    Args:
        codes: unsigned ``[out, groups, group size]``.
        scales: float32 ``[out, groups]``.
        offsets: likewise, or None.
        bits: 4 or 8, of the format that holds it.
        middle: the code of zero.
    """
    rows, size = codes.flatten(1).t(), codes.shape[2]
    scales, offsets = scales.t().contiguous(), None if offsets is None else offsets.t().contiguous()
    if bits == 4:
        zeros = None if middle == 8 else torch.full_like(scales, middle, dtype=torch.uint8)
        return Int4Weight(pack_nibbles(rows), scales, zeros, size, None, offsets)
    return Int8Weight((rows.to(torch.int16) - middle).to(torch.int8), scales, None, size, None, offsets)


def _halves(packed: Tensor) -> Tensor:
    """Four-bit codes, the first half of a block in the low bits: ``[..., n]`` -> ``[..., 2n]``."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _fifth(packed: Tensor) -> Tensor:
    """A bit for each of 32 codes, from four bytes ``[..., 4]``, as 0 or 16."""
    return ((packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1).flatten(-2) << 4


def _q8_0(blocks: Tensor) -> RowWeight:
    signed = blocks[..., 2:].view(torch.int8).to(torch.int16)
    return _grouped(signed + 128, _half(blocks[..., :2]), None, 8, 128)


def _q4_0(blocks: Tensor) -> RowWeight:
    return _grouped(_halves(blocks[..., 2:]), _half(blocks[..., :2]), None, 4, 8)


def _q4_1(blocks: Tensor) -> RowWeight:
    return _grouped(_halves(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4]), 4, 0)


def _q5_0(blocks: Tensor) -> RowWeight:
    return _grouped(_halves(blocks[..., 6:]) | _fifth(blocks[..., 2:6]), _half(blocks[..., :2]), None, 8, 16)


def _q5_1(blocks: Tensor) -> RowWeight:
    codes = _halves(blocks[..., 8:]) | _fifth(blocks[..., 4:8])
    return _grouped(codes, _half(blocks[..., :2]), _half(blocks[..., 2:4]), 8, 0)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets of the eight groups in a block of Q4_K and Q5_K, float32 ``[out, blocks * 8]``."""
    d, least, six = _half(blocks[..., :2]), _half(blocks[..., 2:4]), blocks[..., 4:16]
    first, second, last = six[..., :4], six[..., 4:8], six[..., 8:]
    scales = torch.cat([first & 63, (last & 15) | (first >> 2 & 48)], dim=-1)
    minimums = torch.cat([second & 63, (last >> 4) | (second >> 2 & 48)], dim=-1)
    return (d.unsqueeze(-1) * scales).flatten(1), -(least.unsqueeze(-1) * minimums).flatten(1)


def _q4_k(blocks: Tensor) -> RowWeight:
    codes = _halves(blocks[..., 16:].unflatten(-1, (4, 32))).reshape(blocks.shape[0], -1, 32)
    return _grouped(codes, *_k_scales(blocks), 4, 0)


def _q5_k(blocks: Tensor) -> RowWeight:
    low = _halves(blocks[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)
    high = (
        blocks[..., 16:48].unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8, device=blocks.device).unsqueeze(-1)
    ) & 1
    codes = (low | high << 4).reshape(blocks.shape[0], -1, 32)
    return _grouped(codes, *_k_scales(blocks), 8, 0)


def _q6_k(blocks: Tensor) -> RowWeight:
    low, high = blocks[..., :128].unflatten(-1, (2, 1, 64)), blocks[..., 128:192].unflatten(-1, (2, 1, 32))
    low = torch.cat([low & 15, low >> 4], dim=-2).flatten(-2)
    high = (high >> torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device).unsqueeze(-1) & 3).flatten(-2)
    codes = (low | high << 4).reshape(blocks.shape[0], -1, 16)
    scales = (_half(blocks[..., 208:]).unsqueeze(-1) * blocks[..., 192:208].view(torch.int8)).flatten(1)
    return _grouped(codes, scales, None, 8, 32)


_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
# Number -> name, inputs of a block, and what decodes blocks ``[out, blocks, bytes]``.
_BLOCKS: dict[int, tuple[str, int, Callable[[Tensor], RowWeight]]] = {
    2: ("Q4_0", 32, _q4_0),
    3: ("Q4_1", 32, _q4_1),
    6: ("Q5_0", 32, _q5_0),
    7: ("Q5_1", 32, _q5_1),
    8: ("Q8_0", 32, _q8_0),
    12: ("Q4_K", 256, _q4_k),
    13: ("Q5_K", 256, _q5_k),
    14: ("Q6_K", 256, _q6_k),
}

GGUF = Kind("GGUF", _matches, named_features, _weight)
