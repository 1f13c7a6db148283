# SPDX-License-Identifier: Apache-2.0
"""The tuner, on a GPU that is a formula."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import tune_sparse_linear as tune
from spon_plugin import SponError
from spon_plugin.kernels.triton import configs
from spon_plugin.kernels.triton.configs import Device, Launch, Shape

BEST = Launch("compaction", block_in=64, block_out=256, splits=11, num_warps=8, num_stages=2, resident=4)
START = Launch("dense_mask", block_in=16, block_out=32, splits=1, num_warps=1, num_stages=1, resident=8)


def distance(launch: Launch) -> float:
    """One at `BEST`, more elsewhere; narrow blocks of many warps cannot run."""
    if launch.block_out < 8 * launch.num_warps:
        return math.inf
    steps = [abs(math.log2(getattr(launch, axis) / getattr(BEST, axis))) for axis in tune.AXES]
    return 1 + sum(steps) + (launch.kernel != BEST.kernel)


def formula_timer(rows: int):
    """Rows make the sparse kernels slower and the dense GEMM not: even at six rows."""
    return (lambda launch: rows * distance(launch) * 1e-6), 6e-6


def test_descent_finds_the_best_and_measures_nothing_twice() -> None:
    measured = []

    def seconds(launch: Launch) -> float:
        measured.append(launch)
        return distance(launch)

    assert tune.tune_rows(START, seconds) == (BEST, 1.0)
    assert len(measured) == len(set(measured))


def test_descent_ignores_noise() -> None:
    times = iter([1.0] + [0.995] * 1000)
    assert tune.descend(START, lambda launch: next(times)) == (START, 1.0)


def test_crossover_is_the_last_batch_that_wins() -> None:
    lines = []
    shape = tune.tune_shape(
        "bfloat16", 512, 512, [1, 2, 4, 8, 16], lambda rows: START, formula_timer, "here", lines.append
    )
    assert shape == Shape("here", ("bfloat16",), 512, 512, 4, {1: BEST, 2: BEST, 4: BEST})
    assert len(lines) == 4 and "rows 8" in lines[-1], "8 rows lose, 16 are not tried"


def test_never_faster_than_dense() -> None:
    shape = tune.tune_shape(
        "float32", 512, 512, [1], lambda rows: START, lambda rows: (distance, 1e-9), "here", lambda line: None
    )
    assert (shape.crossover, shape.launches) == (0, {})


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


def test_the_whole_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(tune, "cuda_timer", lambda *args: formula_timer)
    monkeypatch.setattr(tune, "multiprocessors", lambda: 132)
    pytest.importorskip("triton")
    path = tmp_path / "nvidia_h100.json"
    path.write_text((configs.DIRECTORY / "nvidia_h100.json").read_text())
    before = configs.read(path)
    configs.read.cache_clear()
    tune.main(["--shapes", "4096x4096,512x768", "--rows", "1,2", "--dtype", "bfloat16", "--output", str(path)])
    after = configs.parse(json.loads(path.read_text()), path.name)
    assert [(shape.source, shape.in_features, shape.out_features) for shape in after.shapes[:2]] == [
        ("measured 1", 4096, 4096),
        ("measured 1", 512, 768),
    ]
    assert after.shapes[0].launches[2] == BEST and after.shapes[0].dtypes == ("bfloat16", "float16")
    assert len(after.shapes) == len(before.shapes) + 1
    assert "H100" in after.sources["measured 1"] and "reasoned" in after.sources
    assert "4096x4096 rows 2: 2.0 us, dense 6.0 us (3.00x)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--device", "cpu"], "--device"), (["--dtype", "int8"], "--dtype"), (["--shapes", "4096"], "--shapes")],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_options(arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SponError, match=named):
        tune.main(arguments)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SponError, match="a CUDA device to measure"):
        tune.main([])
