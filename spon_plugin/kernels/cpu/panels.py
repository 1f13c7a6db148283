# SPDX-License-Identifier: Apache-2.0
"""Products of many rows with a weight that lies by inputs, in any format, on a CPU: panel by panel.

A prompt skips nothing, so what counts is arithmetic. A panel of the weight is decoded once, into the order in which
the vector code of `panel_tile` reads it, and multiplied by all rows while it is in the caches: in float32, or, for x in
bfloat16 where the processor multiplies that, in bfloat16 with sums in float32 (`panel_tile_bf16`).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spon_plugin import machine
from spon_plugin.kernels.arguments import Thresholds
from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.kernels.cpu import panels_layout as layout
from spon_plugin.kernels.cpu import scaled
from spon_plugin.kernels.cpu.scaled_layout import CALL_FIELDS, INT8, LAYER_FIELDS, WEIGHT_FIELDS
from spon_plugin.kernels.few_rows import CPU_ROWS
from spon_plugin.machine import DTYPES
from spon_plugin.weights.scaled import ScaledWeight

NAME = "panels"
"""As reports call it."""

ROWS = 512  # of x that are multiplied in one go: what is put in order for them takes 2 kB for each input
SUMS = 1 << 18  # floats that a thread sums up at once: 1 MiB, which the caches hold beside a panel
BF16_SUMS = 1 << 17  # likewise beside a panel of bfloat16
BF16_ROWS = 16  # of matrices in bfloat16: more of them torch multiplies as fast, or faster
_CODES = {"int8": INT8, "fp8": layout.CODE_FLOAT8, "int4": layout.CODE_NIBBLES}
_CALL, _WEIGHT, _LAYER = (struct.Struct(f"{len(part)}q") for part in (CALL_FIELDS, WEIGHT_FIELDS, LAYER_FIELDS))
_REST = struct.Struct(f"{len(layout.FIELDS) - len(CALL_FIELDS) - len(WEIGHT_FIELDS) - len(LAYER_FIELDS)}q")


def why_not(x: Tensor, weight: Tensor | ScaledWeight | None) -> str:
    """The reason why something else is to multiply these; empty where this is.

    Torch's products stay where they are the better ones: of dtypes that the processor multiplies natively, but for few
    rows of bfloat16, which torch would put in order first; of float32 with AVX-512, for which this was never measured,
    and for so few rows that memory is all that counts.

    Args:
        x: ``[..., in_features]``.
        weight: ``[in_features, out_features]``; None for a contiguous matrix in `x.dtype`.
    """
    if not x.is_cpu:
        return f"for CPUs, not {x.device.type}"
    if not cpu.is_available():
        return "Numba or GNU's OpenMP is missing"
    if x.dtype not in DTYPES.values():
        return f"for float32, bfloat16 and float16, not {x.dtype}"
    from spon_plugin.kernels.cpu.processor import features

    found = features()
    if not {"avx2", "fma"} <= found:
        return "for processors with AVX2 and FMA"
    if isinstance(weight, ScaledWeight):
        return scaled.why_not(weight)
    if weight is not None and (weight.dtype != x.dtype or not weight.is_contiguous()):
        return "for contiguous matrices [in_features, out_features] in the dtype of x"
    if x.dtype != torch.float32:
        if not machine.is_native(x.dtype):
            return ""
        if not _in_bf16(x):
            return f"torch multiplies {machine.name_of(x.dtype)}, which is native here"
        return "" if x.numel() <= BF16_ROWS * x.size(-1) else f"torch multiplies more than {BF16_ROWS} rows of bfloat16"
    if "avx512f" in found:
        return "torch multiplies float32 where there is AVX-512"
    return "" if x.numel() > CPU_ROWS * x.size(-1) else f"torch multiplies 1 to {CPU_ROWS} rows of float32"


def _in_bf16(x: Tensor) -> bool:
    """Whether panels are of bfloat16: for x in it, where the processor multiplies it."""
    if x.dtype != torch.bfloat16 or not machine.is_native(x.dtype):
        return False
    from spon_plugin.kernels.cpu.panel_tile_bf16 import is_available

    return is_available()


@functools.cache
def _worker(bf16: bool) -> tuple[Any, int, int, int]:
    """The compiled thread function, its address, and outputs of a strip and of a panel; see `kernel._worker`."""
    if bf16:
        from spon_plugin.kernels.cpu.panels_bf16_worker import compile_panels_bf16_worker

        compiled = compile_panels_bf16_worker()
        return compiled, compiled.address, layout.BF16_COLUMNS, layout.BF16_PANEL
    from spon_plugin.kernels.cpu.panel_tile import COLUMNS
    from spon_plugin.kernels.cpu.panels_worker import compile_panels_worker

    compiled = compile_panels_worker()
    return compiled, compiled.address, COLUMNS, layout.PANEL


def sparse_linear(
    x: Tensor,
    weight: Tensor | ScaledWeight,
    threshold: Tensor | None,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
) -> Tensor:
    """``y = S(x) W^T + bias`` for any number of rows, summed in float32, rounded once. No gradient.

    Weights with scales are float32 as well, but where x is bfloat16 and the processor multiplies that: there they are
    rounded to bfloat16, as a model of that dtype would hold them.

    The sums of an output are added up in the order of the inputs: its bits depend neither on the number of threads nor
    on the other rows.

    Args:
        x: ``[..., in_features]``.
        weight: ``[in_features, out_features]``; see `why_not`.
        threshold: as in `reference.sparse_linear`; None masks nothing.
        bias: likewise.
        shard_sizes: likewise; with four bits, all but the last even.

    Returns:
        ``[..., out_features]`` in `x.dtype`.
    """
    codes = weight.codes if isinstance(weight, ScaledWeight) else weight
    in_features = codes.shape[0]
    out_features = weight.out_features if isinstance(weight, ScaledWeight) else weight.shape[1]
    rows, shape = x.shape[:-1].numel(), (*x.shape[:-1], out_features)
    flat, bias = x.reshape(rows, in_features).contiguous(), None if bias is None else bias.contiguous()
    shards: list[tuple[Tensor | None, int]] = [(None, out_features)]
    if threshold is not None:
        thresholds = Thresholds.of(threshold, codes, shard_sizes, out_features)
        shards = [(tau.contiguous(), size) for tau, size in zip(thresholds.rows, thresholds.sizes, strict=True)]
    y = x.new_empty((rows, out_features))
    for part, out in zip(flat.split(ROWS), y.split(ROWS), strict=True):
        begin = 0
        for tau, size in shards:
            _multiply(part, weight, tau, bias, out, begin, size)
            begin += size
    return y.view(shape)


def _multiply(
    x: Tensor, weight: Tensor | ScaledWeight, tau: Tensor | None, bias: Tensor | None, y: Tensor, first: int, width: int
) -> None:
    """Outputs from `first` on, `width` of them, of contiguous rows of x, into contiguous rows of y."""
    if not (x.shape[0] and width):
        return
    bf16, threads = _in_bf16(x), torch.get_num_threads()
    _, address, columns, panel = _worker(bf16)
    rows = layout.bf16_padded(x.shape[0]) if bf16 else layout.padded(x.shape[0])
    per_panel = panel // columns
    most = (BF16_SUMS if bf16 else SUMS) // (rows * columns) // per_panel * per_panel
    strips = min(-(-width // columns), max(per_panel, most))
    if bf16:
        shared, *_, words = layout.bf16_scratch_parts(rows, x.shape[1], strips)
    else:
        shared, words = -(-rows * x.shape[1] // 16) * 16, layout.scratch_parts(rows, strips, columns)[-1]
    scratch = cpu.scratch(shared + threads * words)
    if isinstance(weight, ScaledWeight):
        parts, kind, bits = scaled.weight_words(weight, first, width), _CODES[weight.format], 8 // weight.unit
    else:
        kind, size = scaled.KINDS[weight.dtype], weight.element_size()
        start, stride, bits = weight.data_ptr() + first * size, weight.stride(0) * size, 8 * size
        parts = _WEIGHT.pack(start, stride, *[0] * 12, x.shape[1], width)
    target = y.data_ptr() + first * y.element_size()
    call = _CALL.pack(x.data_ptr(), scaled.KINDS[x.dtype], target, x.shape[0], 0, 0, scratch.data_ptr(), cpu.barrier())
    mask, per_channel = (0, 0) if tau is None else (tau.data_ptr(), int(tau.numel() > 1))
    layer = _LAYER.pack(mask, per_channel, *scaled.part_words(bias, first)[:2], y.stride(0))
    cpu.parallel()(address, call + parts + layer + _REST.pack(kind, bits, rows, strips), threads, 0)
