# SPDX-License-Identifier: Apache-2.0
"""The field's own dense kernels for the bits of a weight on a GPU, as baselines of `benchmarks.sparse_linear`.

int4 by groups: torch's tinygemm (``_weight_int4pack_mm``), and Marlin where its library is given. int8 by output:
``_weight_int8pack_mm``. FP8: ``_scaled_mm``, cuBLAS's W8A8, on inputs that are FP8 already, so without the time that
rounding them takes. None adds a bias, which our kernel does in the same time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import marlin
from spon_plugin.kernels.few_rows import GPU_ROWS
from spon_plugin.weights.int4 import Int4Weight, unpack_nibbles
from spon_plugin.weights.scaled import ScaledWeight

# Relative error in the Frobenius norm: rounded outputs; and inputs rounded to FP8, a thirtieth of each at most.
Product = Callable[[Tensor], Tensor]

TOLERANCE, TOLERANCE_FP8_INPUTS = 2e-2, 6e-2
# Tiles of the reduction that tinygemm reads at once: what torchao takes.
INNER_TILES = 8
# cuBLAS has no FP8 product of fewer rows.
FP8_ROWS = 16
COPIED = 256 << 20


def products(weight: ScaledWeight, x: Tensor, library: Path | None = None) -> dict[str, Product]:
    """Dense products by the kernels that take the weight and run here, each on a copy of the weight of its own.

    A kernel that is missing, fails, or computes something else than the weight says is left out, with a word on stderr.

    Args:
        weight: on a GPU.
        x: ``[rows, in_features]`` there, bfloat16: what a product is tried on.
        library: Marlin's (`benchmarks.marlin`).

    Returns:
        "packed", torch's kernel for the format; and "marlin", which takes and gives float16.
    """
    makers: dict[str, Callable[[], Product]] = {}
    if weight.zeros is None and weight.offsets is None:
        if isinstance(weight, Int4Weight):
            makers["packed"] = partial(_tinygemm, weight)
            if library is not None and marlin.fits(weight):
                makers["marlin"] = partial(_marlin, weight, library)
        elif weight.format == "int8" and weight.scales.shape[0] == 1:
            makers["packed"] = partial(_int8, weight)
        elif weight.format == "fp8" and weight.scales.shape[0] == 1:
            makers["packed"] = partial(_fp8, weight)
    made = {}
    for name, maker in makers.items():
        try:
            product = maker()
            _check(product(taken_by(name, weight, x))[: x.shape[0]], weight, x)
        except (RuntimeError, NotImplementedError, OSError, AttributeError, ValueError) as error:
            print(f"baseline {name} of {weight.format} left out: {error}", file=sys.stderr)
        else:
            made[name] = product
    return made


def taken_by(name: str, weight: ScaledWeight, x: Tensor) -> Tensor:
    """`x` as the product takes it: Marlin's in float16, cuBLAS's in FP8 and in `FP8_ROWS` rows at least."""
    if name == "marlin":
        return x.half()
    if weight.format != "fp8":
        return x
    rows = x.new_zeros(max(FP8_ROWS, x.shape[0]), x.shape[1])
    rows[: x.shape[0]] = x
    return rows.to(torch.float8_e4m3fn)


def baselines(
    weights: Sequence[ScaledWeight], x: Tensor, library: Path | None = None
) -> dict[str, Callable[[int], Tensor]]:
    """`products` of the first weight, on as many cold copies as there are weights."""
    first = products(weights[0], x, library)
    sets = [first, *(products(weight, x, library) for weight in weights[1:])] if first else []
    taken = {name: taken_by(name, weights[0], x) for name in first}
    return {name: lambda i, name=name: sets[i][name](taken[name]) for name in first}  # type: ignore[misc]


def copier(device: torch.device) -> tuple[Callable[[int], Tensor], int]:
    """A device-to-device copy that no cache holds, and the bytes that it reads and writes."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda i: target.copy_(source), 2 * COPIED


def _check(received: Tensor, weight: ScaledWeight, x: Tensor) -> None:
    expected = x.float() @ weight.dense().float()
    error = float((received.float() - expected).norm() / expected.norm())
    if not error <= (TOLERANCE_FP8_INPUTS if weight.format == "fp8" else TOLERANCE):
        raise ValueError(f"relative error {error:.1e}")


def _tinygemm(weight: Int4Weight) -> Product:
    codes = unpack_nibbles(weight.codes, weight.out_features).t().contiguous()
    pairs = codes[:, 0::2] << 4 | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), INNER_TILES)
    # (code - 8) scale + zero
    scales = torch.stack([weight.scales, torch.zeros_like(weight.scales)], -1).bfloat16().contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, weight.group_size, scales)


def _marlin(weight: Int4Weight, library: Path) -> Product:
    codes, scales = marlin.pack(weight)
    space = marlin.workspace(weight)
    return lambda x: marlin.matmul(library, x, codes, scales, space)


def _int8(weight: ScaledWeight) -> Product:
    codes, scales = weight.codes.t().contiguous(), weight.scales[0].bfloat16()
    return lambda x: torch._weight_int8pack_mm(x, codes, scales)


def _fp8(weight: ScaledWeight) -> Product:
    # Columns lie one after the other, as cuBLAS wants the second matrix.
    codes = weight.codes.t().contiguous().t()
    by_column = weight.scales.float().contiguous()
    by_row = torch.ones(GPU_ROWS, 1, device=codes.device)

    def product(x: Tensor) -> Tensor:
        return torch._scaled_mm(
            x,
            codes,
            scale_a=by_row[: x.shape[0]],
            scale_b=by_column,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return product
