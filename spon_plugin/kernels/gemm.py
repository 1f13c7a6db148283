# SPDX-License-Identifier: Apache-2.0
"""Dense products on a weight that lies ``[in, out]``: for batches in which hardly any channel is masked in all rows.

On a CPU `cpu.panels` multiplies, unless it says `why_not`. Otherwise, where the machine multiplies the weight's dtype
natively, they run in the device's own GEMM. A CPU that emulates bfloat16 or float16 takes up to a hundred times as long
as it need: there they run in float32, a panel of the weight at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spon_plugin import machine
from spon_plugin.kernels.arguments import Thresholds, is_plain
from spon_plugin.kernels.cpu import panels
from spon_plugin.masking import sparsify

# Floats of a panel: 1 MiB. It is read while the caches still hold it; smaller ones add up the result more often.
_PANEL = 1 << 18
# Rows of the weight in a panel of many rows of x: their sums leave the cache from one panel to the next.
_DEEP = 256

_local = threading.local()


def sparse_linear(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
) -> Tensor:
    """``y = S(x) weight_t + bias`` with one dense product per distinct mask.

    In the device's own GEMM it is as accurate as a dense linear layer on that device in that dtype: a float32 bias is
    rounded to `x.dtype` first, and float32 follows `torch.backends.cuda.matmul`'s precision. By panels, sums and bias
    are float32 and are rounded once. No gradient.

    Args:
        x: as in `reference.sparse_linear`.
        weight_t: likewise.
        threshold: likewise.
        bias: likewise.
        shard_sizes: likewise.

    Returns:
        ``[..., out_features]`` in `x.dtype`.

    Raises:
        SponError: a threshold that does not fit. The operator has checked the rest.
    """
    if not panels.why_not(x, weight_t):
        return panels.sparse_linear(x, weight_t, threshold, bias, shard_sizes=shard_sizes)
    thresholds = Thresholds.of(threshold, weight_t, shard_sizes)
    in_features, out_features = weight_t.shape
    rows = x.shape[:-1].numel()
    flat = x.reshape(rows, in_features)
    y = x.new_empty((rows, out_features))
    wide = not machine.is_native(x.dtype, x.device)
    with torch.no_grad():
        flat = flat.float() if wide else flat
        own_bias = bias if bias is None or wide else bias.to(x.dtype)
        begin = 0
        for row, size in zip(thresholds.rows, thresholds.sizes, strict=True):
            # Written in place: shards are column ranges of one result, and copying them together would cost as much
            # as reading a good part of the weights.
            columns = slice(begin, begin + size)
            kept = sparsify(flat, row)
            part = None if own_bias is None else own_bias[columns]
            if wide:
                y[:, columns] = _by_panels(kept, weight_t[:, columns], part)
            elif part is None:
                torch.mm(kept, weight_t[:, columns], out=y[:, columns])
            else:
                torch.addmm(part, kept, weight_t[:, columns], out=y[:, columns])
            begin += size
    return y.view(*x.shape[:-1], out_features)


def dense_linear(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x weight_t + bias``: `torch.nn.functional.linear` for a weight that lies ``[in, out]``.

    It is that function itself where torch is the faster one (`panels.why_not`), where the weight lies otherwise, and
    whenever a gradient, autocast or a compiler has to see it.

    Args:
        x: ``[..., in_features]``.
        weight_t: ``[in_features, out_features]`` in `x.dtype`.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]`` in `x.dtype`.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight_t.t(), bias)
    asks = x.requires_grad or weight_t.requires_grad or (bias is not None and bias.requires_grad)
    if x.dtype != weight_t.dtype or not weight_t.is_contiguous() or (asks and torch.is_grad_enabled()):
        return F.linear(x, weight_t.t(), bias)
    if is_plain(x, weight_t, bias) and not panels.why_not(x, weight_t):
        return panels.sparse_linear(x, weight_t, None, bias)
    if machine.is_native(x.dtype, x.device):
        return F.linear(x, weight_t.t(), bias)
    with torch.no_grad():
        y = _by_panels(x.reshape(x.shape[:-1].numel(), x.shape[-1]).float(), weight_t, bias).to(x.dtype)
    return y.view(*x.shape[:-1], weight_t.shape[1])


def _by_panels(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight_t + bias`` in float32 for a float32 x ``[rows, in_features]``, the weight widened panel by panel."""
    rows, (in_features, out_features) = x.shape[0], weight_t.shape
    depth = max(1, min(in_features, max(_PANEL // max(1, out_features), min(rows, _DEEP))))
    panel = _panel(depth * out_features).view(depth, out_features)
    y = x.new_zeros((rows, out_features)) if bias is None else bias.float().repeat(rows, 1)
    for first in range(0, in_features, depth):
        part = weight_t[first : first + depth]
        wide = panel[: len(part)]
        wide.copy_(part)
        y.addmm_(x[:, first : first + depth], wide)
    return y


def _panel(floats: int) -> Tensor:
    """What a thread widens panels into, held between calls: fresh pages would cost more than filling them."""
    held: Tensor | None = getattr(_local, "panel", None)
    if held is None or held.numel() < floats:
        with torch.inference_mode(False):  # one made in inference could not be written outside of it
            held = _local.panel = torch.empty(floats, dtype=torch.float32, device="cpu")
    return held[:floats]
