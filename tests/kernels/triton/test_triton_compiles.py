# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compile for GPUs that need not be there, to machine code that skips and overlaps what it promises.

`compile_triton` says how to run this with another Triton than the installed one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from spon_plugin.kernels.triton.configs import DIRECTORY, FILL, FORMATS, Launch, fill

pytest.importorskip("triton", reason="the GPU kernels are written in Triton")
ROOT = Path(__file__).parents[3]
# The files of `configs/` for GPUs of a compute capability; the L40S's 8.9 runs what is compiled for 8.0.
DEVICES = {80: ("default", "nvidia_a100", "nvidia_l40s"), 90: ("default", "nvidia_h100", "nvidia_h200"),
           100: ("default", "nvidia_b200")}  # fmt: skip
# Of a multiprocessor: threads, and bytes of shared memory. Of a device of that capability: multiprocessors.
THREADS = 2048
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
# Bytes of stack that lists of codes may take: four registers of a thread, with zero points on 10.0.
SPILLED = 16
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
# in_features, and the widths of the shards: q/k/v, o, gate and up, down of Llama 3 8B and 70B, Qwen3 0.6B, 8B and 32B.
SHAPES = [
    *((4096, sizes) for sizes in ((4096, 1024, 1024), (4096,), (14336, 14336), (12288, 12288), (1024,), (14336,))),
    *((8192, sizes) for sizes in ((8192, 1024, 1024), (8192,), (28672, 28672))),
    *((5120, sizes) for sizes in ((8192, 1024, 1024), (25600, 25600))),
    *((1024, sizes) for sizes in ((2048, 1024, 1024), (3072, 3072))),
    *((wide, (narrow,)) for wide, narrow in ((14336, 4096), (12288, 4096), (28672, 8192), (25600, 5120), (3072, 1024))),
]


@cache
def compiled(capabilities: str, *what: str) -> list[dict]:
    """Compile in a process of its own, because this one may interpret Triton."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.compile_triton", capabilities, *what],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        timeout=1800,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Triton's cache, for these tests alone, so that everything is compiled."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def shipped(capability: int, *kernels: str) -> list[dict]:
    """Some kernels, or those that load weights, at every shipped launch."""
    kernels = kernels or ("_dense_mask", "_gather", "_scaled")
    files = [str(DIRECTORY / f"{name}.json") for name in DEVICES[capability]]
    every = compiled(str(capability), *files) + compiled(str(capability), "formats", *files)
    lines = [line for line in every if line["kernel"] in kernels]
    assert {line["rows"] for line in lines} >= {1, 4}
    assert {line["dtype"] for line in lines} >= ({"torch.bfloat16", *FORMATS} if "_scaled" in kernels else set())
    return lines


def residents(line: dict, capability: int) -> int:
    """Programs that a multiprocessor holds: as many as its registers, threads and shared memory go round."""
    threads = 32 * line["launch"]["num_warps"]
    registers = -(-line["registers"] // 8) * 8 * threads
    # The system takes a KiB of every program's.
    return min(65536 // registers, THREADS // threads, SHARED[capability] // (line["shared"] + 1024))


def test_every_file_of_launches_is_compiled() -> None:
    assert {name for names in DEVICES.values() for name in names} == {path.stem for path in DIRECTORY.glob("*.json")}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_shipped_launches_keep_enough_loads_of_weights_in_flight(capability: int) -> None:
    """Bandwidth is bytes in flight by latency: one row wants six loads of a thread, several two tiles of copies."""
    for line in shipped(capability):
        assert line["loads_in_flight"] >= 6 or line["stages_in_flight"] >= 2, line


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_shipped_launches_fit_their_registers(capability: int) -> None:
    for line in shipped(capability):
        assert line["stack"] == 0, f"registers spill: {line}"
        assert line["registers"] <= Launch(**line["launch"]).maxnreg, line
        assert residents(line, capability) >= line["launch"]["resident"], line


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_shipped_launches_skip_weights_sixteen_bytes_at_a_time(capability: int) -> None:
    for line in shipped(capability):
        loads = line["weight_loads"] == [".v4.b32"] and line["weight_loads_predicated"]
        copies = line["weight_loads"] == [] and line["copies"] > 0 and line["copies_predicated"]
        assert loads or copies, line
        assert line["tensor_cores"] == (line["rows"] > 1), line


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{'+'.join(map(str, shape[1]))}")
@pytest.mark.parametrize("capability", SHARED)
def test_shipped_launches_leave_no_small_last_wave(capability: int, shape: tuple[int, Sequence[int]]) -> None:
    """A grid is there at once, or fills the slots of all its waves but for a fifth.

    Of matrices: kernels of weights with scales differ in registers by format and argument under one launch, so that a
    multiprocessor may hold more of them than `resident`, by which `test_configs` checks their waves.
    """
    in_features, sizes = shape
    for line in shipped(capability, "_dense_mask", "_gather"):
        launch = Launch(**{**line["launch"], "splits": None}).fitted(in_features, sizes, MULTIPROCESSORS[capability])
        programs = launch.grid(sizes) * launch.splits
        slots = residents(line, capability) * MULTIPROCESSORS[capability]
        assert programs <= slots or fill(programs, slots) >= FILL, f"{programs} programs, {slots} slots: {launch}"


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_the_launch_that_sums_up_starts_early_and_waits(capability: int) -> None:
    """From Hopper on; and the compiler has moved no load before the wait."""
    for line in shipped(capability, "_reduce"):
        assert line["starts_early"] == line["waits_first"] == (capability >= 90), line


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_lists_of_codes_leave_registers_for_loads(capability: int) -> None:
    """As many programs as the tuner begins with, each with a block's loads all under way, or copied two tiles ahead."""
    lines = [line for line in compiled(str(capability), "lists") if line["kernel"] == "_listed"]
    assert {line["dtype"] for line in lines} == set(FORMATS)
    for line in lines:
        assert line["loads_in_flight"] >= 8 or line["stages_in_flight"] >= 2, line
        assert line["weight_loads_predicated"] and line["copies_predicated"], line
        if not line["copies"]:  # which an older Triton makes of some (`scaled.copied_ahead`), and which take more room
            assert line["stack"] <= SPILLED and residents(line, capability) >= line["launch"]["resident"], line


@pytest.mark.slow
def test_every_kind_of_argument_compiles() -> None:
    lines = compiled("90", "variants")
    assert {line["kernel"] for line in lines} >= {"_dense_mask", "_gather", "_list_kept"}
    for line in lines:
        assert line["weight_loads_predicated"] and line["copies_predicated"], line
