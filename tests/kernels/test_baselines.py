# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of GPU kernels do before a GPU is there: packing, timing and the stack, at sizes for a CPU."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import block_stack, marlin, tuning
from benchmarks.tuning import Task, Timer
from spon_plugin.kernels.triton.configs import Launch
from spon_plugin.weights.int4 import Int4Weight, pack_nibbles

LAUNCH = Launch("dense_mask", block_in=32, block_out=32, splits=1, num_warps=1, num_stages=3, resident=4)


def test_marlin_gets_each_code_and_scale_once() -> None:
    """Every fourth word of a tile of 16 by 64 holds what a thread multiplies: rows 2t and 2t + 1, and those 8 on."""
    torch.manual_seed(0)
    codes, scales = torch.randint(0, 16, (128, 256), dtype=torch.uint8), torch.rand(1, 256).half()
    words, packed = marlin.pack(Int4Weight(pack_nibbles(codes), scales, None, 128))
    assert words.shape == (8, 512) and words.dtype == torch.int32
    assert sorted(packed.flatten().tolist()) == sorted(scales.flatten().tolist())
    nibbles = torch.stack([words >> 4 * place & 15 for place in range(8)], -1)
    for lane in range(32):
        row, column = 2 * (lane % 4), lane // 4
        first = [codes[row + down, column + on] for down, on in ((0, 0), (8, 0), (0, 8), (8, 8))]
        first += [codes[row + down + 1, column + on] for down, on in ((0, 0), (8, 0), (0, 8), (8, 8))]
        assert nibbles[0, 4 * lane].tolist() == first, lane


def test_marlin_takes_what_its_tiles_divide() -> None:
    weight = Int4Weight(torch.zeros(128, 128, dtype=torch.uint8), torch.ones(1, 256), None, 128)
    assert marlin.fits(weight) and not marlin.fits(weight.shard(0, 128)) and not marlin.fits(torch.zeros(128, 256))


@pytest.mark.parametrize("format", block_stack.FORMATS)
def test_the_stack_masks_the_share_that_is_asked_for(format: str) -> None:
    with torch.no_grad():
        rows = block_stack.measure([format], [0.0, 0.5], (128, 256, 64), 2, torch.device("cpu"), torch.float32, 0.0)
    ours = [row for row in rows if row["variant"] != "torch"]
    assert [row["sparsity"] for row in ours] == [0.0, 0.5] and all(row["finite"] for row in rows)
    assert ours[0]["skipped"] == 0 and ours[1]["skipped"] == pytest.approx(0.5, abs=0.02)
    assert (len(rows) == 3) == (format == "dense"), "torch is the baseline of all"


def test_a_stack_with_nothing_masked_is_the_dense_one() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = block_stack.weights_of("dense", (64, 96, 32), torch.float32, generator)
    x = torch.randn(1, 64, generator=generator)
    ours = {name: block_stack.Masked(weight) for name, weight in weights.items()}

    def product(matrix: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda value: value @ matrix

    dense = {name: product(weight.codes) for name, weight in weights.items()}
    torch.testing.assert_close(block_stack.step([ours, ours], x), block_stack.step([dense, dense], x))


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_the_timer_times_launches_and_the_dense_product(
    kind: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(tuning, "copies_for", lambda nbytes, device: 3)
    timer, task = Timer(0.5, 0.0, device.type), Task(kind, (64, 32), 1, 32 if kind == "int4" else 0)
    times = timer.sparse(task, [LAUNCH, replace(LAUNCH, num_stages=1)])
    assert len(times) == 2 and all(0 < taken < float("inf") for taken in times.values())
    assert timer.dense(task) > 0


def test_a_launch_that_cannot_run_takes_forever(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(tuning, "copies_for", lambda nbytes, device: 3)
    broken = replace(LAUNCH, kernel="none")
    assert Timer(0.5, 0.0, device.type).sparse(Task("float32", (64, 32), 1), [broken]) == {broken: float("inf")}
