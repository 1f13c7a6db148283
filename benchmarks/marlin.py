# SPDX-License-Identifier: Apache-2.0
"""The original Marlin kernel (github.com/IST-DASLab/marlin) as a baseline: fp16 times int4 in groups of 128, on a GPU.

Nothing of it is here: a shared library of its `marlin_cuda_kernel.cu` with this entry point is given by the user
(``nvcc -O3 -std=c++17 --expt-relaxed-constexpr -shared -Xcompiler -fPIC -arch=sm_90``):

    extern "C" int marlin_mul(const void* a, const void* b, void* c, void* scales, int m, int n, int k,
                              void* workspace, int group, int device, void* stream) {
      return marlin_cuda(a, b, c, scales, m, n, k, workspace, group, device, (cudaStream_t) stream);
    }
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spon_plugin.weights.int4 import Int4Weight, unpack_nibbles

GROUP = 128
# Widths that its tiles divide.
IN_STEP, OUT_STEP = 128, 256
ENTRY = "marlin_mul"


def permutations() -> tuple[Tensor, Tensor]:
    """How codes of four tiles of 16 by 16 are ordered, ``[1024]``, and scales of 64 columns: as its `Layer.pack` does.

    A thread of the tensor cores finds its codes of a tile in one word, even ones before odd ones.
    """
    order = []
    for thread in range(32):
        one = [
            16 * row + thread // 4 + 8 * block
            for block in range(2)
            for row in (2 * (thread % 4) + step for step in (0, 1, 8, 9))
        ]
        order += [place + 256 * tile for tile in range(4) for place in one]
    codes = torch.tensor(order).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    return codes, torch.tensor([i + 8 * j for i in range(8) for j in range(8)])


def pack(weight: Int4Weight) -> tuple[Tensor, Tensor]:
    """Codes, int32 ``[in / 16, 2 out]``, and scales, float16 ``[groups, out]``, as Marlin reads them."""
    inputs, outputs = weight.in_features, weight.out_features
    codes_order, scales_order = (order.to(weight.codes.device) for order in permutations())
    codes = unpack_nibbles(weight.codes, outputs).int()
    tiles = codes.view(inputs // 16, 16, outputs // 16, 16).permute(0, 2, 1, 3).reshape(-1, codes_order.numel())
    nibbles = tiles[:, codes_order].reshape(inputs // 16, -1, 8)
    words = torch.zeros(nibbles.shape[:2], dtype=torch.int32, device=codes.device)
    for place in range(8):
        words |= nibbles[..., place] << 4 * place
    scales = weight.scales.half().view(-1, scales_order.numel())[:, scales_order]
    return words, scales.reshape(-1, outputs).contiguous()


def fits(weight: Any) -> bool:
    """Whether Marlin takes the weight: int4 in groups of 128, without zero points, of sizes that its tiles divide."""
    return (
        isinstance(weight, Int4Weight)
        and weight.zeros is None
        and weight.group_size == GROUP
        and weight.in_features % IN_STEP == 0
        and weight.out_features % OUT_STEP == 0
    )


def matmul(library: Path, x: Tensor, codes: Tensor, scales: Tensor, workspace: Tensor) -> Tensor:
    """``x W^T`` on the current stream.

    Args:
        library: the shared library.
        x: float16 ``[rows, in_features]``, contiguous.
        codes: from `pack`.
        scales: likewise.
        workspace: int32 ``[out / 128 * 16]``, zeros, and left so.

    Raises:
        RuntimeError: Marlin reports an error.
    """
    rows, inputs = x.shape
    y = x.new_empty(rows, scales.shape[1])
    pointers = [ctypes.c_void_p(part.data_ptr()) for part in (x, codes, y, scales)]
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    wrong = _load(library)[ENTRY](
        *pointers, rows, y.shape[1], inputs, ctypes.c_void_p(workspace.data_ptr()), GROUP, x.device.index or 0, stream
    )
    if wrong:
        raise RuntimeError(f"{library}: {ENTRY} returned {wrong}")
    return y


def workspace(weight: Int4Weight) -> Tensor:
    """As `matmul` wants it for a weight; calls that may run at the same time need one each."""
    return torch.zeros(weight.out_features // 128 * 16, dtype=torch.int32, device=weight.codes.device)


@lru_cache(maxsize=1)
def _load(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library.resolve()))
