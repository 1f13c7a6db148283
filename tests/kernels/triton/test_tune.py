# SPDX-License-Identifier: Apache-2.0
"""The tuner, on a GPU that is a formula."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import launches, tuning
from benchmarks import tune_sparse_linear as tune
from benchmarks.tuning import Search, Task
from spon_plugin import SponError
from spon_plugin.kernels.triton import configs
from spon_plugin.kernels.triton.configs import Device, Launch, Shape

BEST = Launch("compaction", block_in=32, block_out=256, splits=None, num_warps=4, num_stages=4, resident=7)
START = Launch("dense_mask", block_in=64, block_out=128, splits=None, num_warps=4, num_stages=1, resident=6)
TASK = Task("bfloat16", (4096, 4096), 1)


def distance(launch: Launch) -> float:
    """One at `BEST`, more elsewhere; wide programs of many warps cannot run."""
    if launch.num_warps > 8:
        return math.inf
    steps = [abs(math.log2(getattr(launch, axis) / getattr(BEST, axis))) for axis in launches.AXES]
    return 1 + sum(steps) + (launch.kernel != BEST.kernel)


def formula(given: Sequence[Launch]) -> dict[Launch, float]:
    return {launch: distance(launch) for launch in given}


class FormulaTimer:
    """Rows make the sparse kernels slower and the dense GEMM not: even at six rows."""

    def __init__(self, *args: object) -> None:
        self.measured: list[tuple[Task, Launch]] = []

    def sparse(self, task: Task, given: Sequence[Launch]) -> dict[Launch, float]:
        self.measured += [(task, launch) for launch in given]
        return {launch: task.rows * distance(launch) * 1e-6 for launch in given}

    def dense(self, task: Task) -> float:
        return 6e-6


class NoCompilers:
    """Compile nothing, at once; launches of five stages fail, and those of two warps end the process."""

    def submit(self, kind: str, shape: object, group: int, rows: int, launch: Launch) -> Future[int]:
        future: Future[int] = Future()
        if launch.num_stages == 5:
            future.set_exception(RuntimeError("no room"))
        elif launch.num_warps == 2:
            future.set_exception(BrokenExecutor("ended"))
        else:
            future.set_result(1 << 10)
        return future

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU to look at, not to run on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(tuning, "multiprocessors", lambda: 132)
    monkeypatch.setattr(tuning, "shared_memory", lambda: 228 << 10)
    monkeypatch.setattr(tuning, "Compilers", NoCompilers)


def searched(timer: Callable[[Sequence[Launch]], dict[Launch, float]]) -> Search:
    search = Search(TASK, launches.reasoned("bfloat16", 1, START))
    while search.waiting:
        search.measure(timer, search.waiting)
    return search


def test_the_search_ends_at_the_best() -> None:
    search = searched(formula)
    assert (search.best, search.seconds) == (BEST, 1.0)


def test_the_search_ignores_noise() -> None:
    times = itertools.chain([1.0] + [0.995] * 1000)
    search = searched(lambda given: {launch: next(times) for launch in given})
    first = len(launches.reasoned("bfloat16", 1, START))
    assert len(search.known) <= first + len(list(launches.neighbours("bfloat16", 1, search.best)))


def test_no_time_leaves_what_was_measured() -> None:
    search = Search(TASK, [START, BEST])
    search.measure(formula, [START])
    assert search.best == START
    search.measure(lambda given: dict.fromkeys(given, math.inf), [BEST])
    assert (search.best, search.seconds, search.waiting) == (START, distance(START), [])


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("kind", "group"), [("bfloat16", 0), ("float32", 0), ("int8", 0), ("int4", 128), ("fp8", 0)])
def test_candidates_are_launches_that_may_be_shipped(kind: str, group: int, rows: int) -> None:
    dtype = configs.DTYPES.get(kind, kind)
    present = configs.choose("NVIDIA H100 80GB HBM3", dtype, 4096, 4096, rows if kind != "float32" else 1)
    found = launches.reasoned(kind, rows, present, group)
    assert len(found) == len(set(found)) >= 4
    assert {launch.kernel for launch in found} >= set(configs.KERNELS if rows == 1 else ["dense_mask"])
    near = [launch for one in found for launch in launches.neighbours(kind, rows, one, group)]
    for launch in found + near:
        threads = 32 * launch.num_warps
        loads = launch.block_in * launch.block_out / (launches.COLUMNS[kind] * threads)
        assert launch.splits is None and launch.maxnreg * threads * launch.resident <= configs.REGISTERS
        assert loads >= 8 or launch.num_stages > 2
        assert not group or group % launch.block_in == 0
        assert kind in configs.DTYPES or rows == 1 or launch.kernel == "dense_mask"
        configs.parse(as_file(kind, launch), "here")


def as_file(kind: str, launch: Launch) -> dict[str, Any]:
    shape = Shape("here", (kind,), 4096, 4096, 1, {1: launch})
    return tune.as_json(Device({"here": "measured"}, (shape,)))


def test_crossover_is_the_last_batch_that_wins() -> None:
    old = Shape("reasoned", ("bfloat16",), 64, 64, 16, {1: START, 16: START})
    found = [Search(replace(TASK, rows=rows), [], {}, BEST, rows * 1e-6) for rows in (1, 2, 4, 8)]
    shape = tune.combined(old, "bfloat16", found, dict.fromkeys((1, 2, 4, 8), 6e-6), "here")
    assert (shape.crossover, shape.launches) == (4, {1: BEST, 2: BEST, 4: BEST})
    assert shape.dtypes == ("bfloat16", "float16")
    some = tune.combined(old, "bfloat16", found[:2], dict.fromkeys((1, 2), 6e-6), "here")
    assert (some.crossover, list(some.launches)) == (16, [1, 2, 16]), "nobody lost: more rows stay as they were"
    none = tune.combined(old, "bfloat16", found, dict.fromkeys((1, 2, 4, 8), 1e-9), "here")
    assert (none.crossover, none.launches) == (0, {})
    scaled = tune.combined(replace(old, dtypes=("int8",)), "int8", found, {}, "here")
    assert (scaled.crossover, list(scaled.launches)) == (16, [1, 2, 4, 8, 16])


def test_old_shapes_stay_with_their_source() -> None:
    old_shape = Shape("reasoned", ("bfloat16", "float32"), 64, 64, 1, {1: START})
    new_shape = Shape("measured 1", ("bfloat16",), 64, 64, 2, {2: BEST})
    device = tune.merged(Device({"reasoned": "by thought"}, (old_shape,)), [new_shape], {"measured 1": "here"})
    assert device.shapes == (new_shape, replace(old_shape, dtypes=("float32",)))
    assert device.sources == {"reasoned": "by thought", "measured 1": "here"}
    alone = tune.merged(device, [replace(new_shape, dtypes=("float32",))], {"measured 1": "here"})
    assert alone.sources == {"measured 1": "here"}


def test_labels() -> None:
    assert tune.label_of("now", {}) == "measured 1"
    assert tune.label_of("now", {"measured 1": "before"}) == "measured 2"
    assert tune.label_of("before", {"measured 1": "before"}) == "measured 1"


@pytest.mark.parametrize(
    ("device", "file"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia_h100_hbm3.json"),
        ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm4.json"),
        ("NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090.json"),
    ],
)
def test_file_names_serve_their_device(device: str, file: str, tmp_path: Path) -> None:
    assert tune.file_name(device) == file
    (tmp_path / file).touch()
    (tmp_path / "nvidia_h100.json").touch()
    assert configs.file_of(device, tmp_path).name == file


def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> tuple[FormulaTimer, Device]:
    """Run the command on a copy of a file; the timer, and the file afterwards."""
    pytest.importorskip("triton")
    timer = FormulaTimer()
    monkeypatch.setattr(tune, "Timer", lambda *args: timer)
    path = tmp_path / "nvidia_h100.json"
    path.write_text((configs.DIRECTORY / "nvidia_h100.json").read_text())
    configs.read.cache_clear()
    tune.main([*arguments, "--output", str(path)])
    return timer, configs.parse(json.loads(path.read_text()), path.name)


def test_the_whole_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = configs.read(configs.DIRECTORY / "nvidia_h100.json")
    log = tmp_path / "log.json"
    options = ["--shapes", "4096x4096,512x768", "--rows", "1,2", "--format", "dense,int8,int4", "--json", str(log)]
    timer, after = command(monkeypatch, tmp_path, *options)
    known = {(shape.dtypes, shape.in_features, shape.out_features): shape for shape in after.shapes}
    tuned = known[("bfloat16", "float16"), 512, 768]
    assert tuned.launches[2] == BEST and "rows 1, 2" in after.sources[tuned.source]
    assert "H100" in after.sources[tuned.source] and before.shapes[3].source in after.sources, "that of fp8"
    found = known[("int4",), 4096, 4096].launches
    assert (found[1].kernel, found[2].kernel) == ("compaction", "dense_mask")
    assert known[("int4",), 4096, 4096].launches[16] == before.shapes[0].launches[16]
    rows = [task.rows for task, _ in timer.measured]
    assert rows == sorted(rows), "several rows come after one"
    assert {task.group for task, _ in timer.measured if task.kind == "int4"} == {128}
    said = capsys.readouterr().out
    assert "bfloat16 4096x4096 rows 2: 2.0 us, dense 6.0 us (3.00x)" in said and "does not compile" in said
    assert {launch.num_warps for _, launch in timer.measured} >= {2, 4}, "what no process compiled compiles here"
    assert {line["kind"] for line in json.loads(log.read_text())["launches"]} == {"bfloat16", "int8", "int4"}


def test_the_lists_of_all_come_before_the_neighbours_of_any(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timer, _ = command(monkeypatch, tmp_path, "--shapes", "4096x4096,512x768", "--rows", "1", "--format", "int8,fp8")
    order = [key for key, _ in itertools.groupby((task.kind, task.shape) for task, _ in timer.measured)]
    assert order[:4] == [(kind, shape) for shape in ((4096, 4096), (512, 768)) for kind in ("int8", "fp8")]


def test_a_budget_that_is_spent_leaves_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timer, after = command(monkeypatch, tmp_path, "--budget", "0")
    assert not timer.measured and after == configs.read(configs.DIRECTORY / "nvidia_h100.json")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--device", "cpu"], "--device"),
        (["--dtype", "int8"], "--dtype"),
        (["--format", "q4"], "--format"),
        (["--shapes", "4096"], "--shapes"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_options(arguments: list[str], named: str) -> None:
    with pytest.raises(SponError, match=named):
        tune.main(arguments)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SponError, match="a CUDA device to measure"):
        tune.main([])
