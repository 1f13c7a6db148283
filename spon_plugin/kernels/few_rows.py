# SPDX-License-Identifier: Apache-2.0
"""How many rows (tokens) are few: the most that the sparse kernels take, and the most that a host should give them."""

from __future__ import annotations

CPU_ROWS = 8
"""The largest batch of the CPU kernel: beyond it hardly an input is masked in all rows, and a GEMM is faster."""
GPU_ROWS = 16
"""The largest batch of the GPU kernels, likewise; a device's file of `configs/` may stop earlier for a shape."""

# The least share of inputs that all rows must skip. A GPU's dense kernels are the harder ones to beat.
_LEAST_SKIPPED = {"cpu": 0.25, "cuda": 0.3}


def row_limit(sparsity: float, device: str) -> int:
    """The most rows that a step should have to run sparse, where a dense step is exact and as good as free to choose.

    An input's weights are skipped only where every row masks it. Rows mask almost independently, so of b rows with a
    share s masked about ``s ** b`` is skipped. The limit is the largest b that leaves a share worth skipping, at least
    1 and at most what the kernels take: on a GPU 1 at 50%, 2 at 60%, 3 at 70%, 5 at 80%; on a CPU 2, 2, 3, 6.

    Args:
        sparsity: the share of inputs that a row masks, in [0, 1).
        device: the type of the device, as `torch.device` names it; unknown ones count as GPUs.
    """
    most = CPU_ROWS if device == "cpu" else GPU_ROWS
    least = _LEAST_SKIPPED.get(device, _LEAST_SKIPPED["cuda"])
    return max((rows for rows in range(1, most + 1) if sparsity**rows >= least), default=1)
