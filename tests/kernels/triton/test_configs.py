# SPDX-License-Identifier: Apache-2.0
"""Configurations are data: read strictly, chosen by device and shape alone."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spon_plugin import SponError
from spon_plugin.kernels.few_rows import GPU_ROWS
from spon_plugin.kernels.triton import configs
from spon_plugin.kernels.triton.configs import (
    DEFAULT,
    DIRECTORY,
    DTYPES,
    FILL,
    FORMATS,
    Launch,
    choose,
    file_of,
    fill,
    filling,
    parse,
    read,
)

LAUNCH = {
    "kernel": "dense_mask",
    "block_in": 64,
    "block_out": 128,
    "splits": 8,
    "num_warps": 4,
    "num_stages": 1,
    "resident": 6,
}
SHAPE = {
    "source": "test",
    "dtypes": ["bfloat16"],
    "in_features": 4096,
    "out_features": 4096,
    "crossover": 8,
    "launches": {"1": LAUNCH, "8": {**LAUNCH, "kernel": "compaction", "splits": 3}},
}
FILE = {
    "format_version": 2,
    "sources": {"test": "a test"},
    "shapes": [SHAPE, {**SHAPE, "out_features": 14336, "crossover": 0}],
}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own directory of configurations."""
    monkeypatch.setattr(configs, "DIRECTORY", tmp_path)
    monkeypatch.setattr(configs, "file_of", lambda device: file_of.__wrapped__(device, tmp_path))
    choose.cache_clear()
    yield tmp_path
    choose.cache_clear()


@pytest.mark.parametrize("path", sorted(DIRECTORY.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_are_valid_and_say_where_they_come_from(path: Path) -> None:
    device = read(path)
    assert all("measured" in text for text in device.sources.values()), "measured, or not measured"
    for shape in device.shapes:
        for launch in shape.launches.values():
            fitted = launch.fitted(shape.in_features, (shape.out_features,), 132)
            assert launch == replace(fitted, splits=launch.splits), "blocks beyond the shape"
    known = {dtype for shape in device.shapes for dtype in shape.dtypes}
    assert known == {*DTYPES, *FORMATS} or (known == set(FORMATS) and path.stem != DEFAULT), "the default has them all"


@pytest.mark.parametrize("dtype", [*DTYPES.values(), *FORMATS], ids=str)
@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "cpu"])
def test_every_shape_and_batch_has_an_answer(device: str, dtype: torch.dtype | str) -> None:
    for shape in ((1, 1), (576, 1536), (4096, 6144), (14336, 4096), (28672, 8192), (4096, 128256)):
        chosen = [choose(device, dtype, *shape, rows) for rows in range(1, GPU_ROWS + 2)]
        assert chosen[0] is not None and chosen[-1] is None
        crossover = chosen.index(None)
        assert not any(chosen[crossover:]), "sparse again above the crossover"


@pytest.mark.parametrize(
    ("device", "file"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia_h100"),
        ("NVIDIA H100 PCIe", "nvidia_h100"),
        ("NVIDIA H200", "nvidia_h200"),
        ("NVIDIA A100-SXM4-80GB", "nvidia_a100"),
        ("NVIDIA L40S", "nvidia_l40s"),
        ("NVIDIA B200", "nvidia_b200"),
        ("NVIDIA GH200 480GB", "default"),
        ("NVIDIA H1000", "default"),
        ("cpu", "default"),
    ],
)
def test_device_names(device: str, file: str) -> None:
    assert file_of(device).stem == file


def test_the_most_specific_file_wins(directory: Path) -> None:
    for name in ("default", "nvidia_h100", "nvidia_h100_pcie"):
        (directory / f"{name}.json").write_text(json.dumps(FILE))
    assert configs.file_of("NVIDIA H100 PCIe").stem == "nvidia_h100_pcie"
    assert configs.file_of("NVIDIA H100 80GB HBM3").stem == "nvidia_h100"


def test_nearest_shape_smallest_sufficient_launch(directory: Path) -> None:
    (directory / "default.json").write_text(json.dumps(FILE))
    one, many = Launch(**LAUNCH), Launch(**SHAPE["launches"]["8"])
    assert choose("x", torch.bfloat16, 4000, 5000, 1) == one
    assert choose("x", torch.bfloat16, 4000, 5000, 2) == choose("x", torch.bfloat16, 4096, 4096, 8) == many
    assert choose("x", torch.bfloat16, 4096, 4096, 9) is None
    assert choose("x", torch.bfloat16, 4096, 13000, 1) is None, "the nearest shape's crossover is 0"


def test_a_dtype_that_the_device_does_not_know_takes_the_default(directory: Path) -> None:
    (directory / "nvidia_h100.json").write_text(json.dumps(FILE))
    other = {**SHAPE, "dtypes": ["float32"], "crossover": 1}
    (directory / "default.json").write_text(json.dumps({**FILE, "shapes": [other]}))
    assert choose("NVIDIA H100", torch.float32, 4096, 4096, 1) == Launch(**LAUNCH)
    assert choose("NVIDIA H100", torch.float32, 4096, 4096, 2) is None
    with pytest.raises(SponError, match="dtype"):
        choose("NVIDIA H100", torch.float16, 4096, 4096, 1)


def test_fitted_to_small_shapes() -> None:
    launch = Launch(**LAUNCH)
    assert launch.fitted(4096, (4096,), 132) == launch
    assert launch.fitted(100, (40,), 132) == Launch(**{**LAUNCH, "block_out": 64, "splits": 2})
    assert launch.fitted(0, (1,), 132) == Launch(**{**LAUNCH, "block_out": 16, "splits": 1})


@pytest.mark.parametrize("multiprocessors", [20, 56, 58, 72, 84, 108, 114, 128, 132, 142, 148, 170, 188])
@pytest.mark.parametrize("path", sorted(DIRECTORY.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_launches_leave_no_small_last_wave(path: Path, multiprocessors: int) -> None:
    """At their own shapes, and at those that take the nearest: whatever the device, all programs are there at once."""
    widths = [(1, 1, 1), (576, 192, 192), (1000,), (4096, 1024, 1024), (4096,), (14336, 14336), (29568, 29568)]
    for shape in read(path).shapes:
        for launch in shape.launches.values():
            for sizes in [(shape.out_features,), *widths]:
                fitted = launch.fitted(shape.in_features, sizes, multiprocessors)
                blocks, slots = fitted.grid(sizes), launch.resident * multiprocessors
                if blocks <= slots:
                    assert blocks * fitted.splits <= slots
                else:
                    assert fill(blocks * fitted.splits, slots) >= FILL


@pytest.mark.parametrize(
    ("blocks_out", "blocks_in", "slots", "splits"),
    [
        (32, 64, 792, 22),  # 24 would fit, and the longest program would have three blocks of channels all the same
        (112, 128, 792, 7),
        (32, 4, 792, 4),
        (1, 10000, 792, 250),
        (792, 64, 792, 1),
        (448, 64, 396, 3),  # 1.13 waves, 2.3, or 3.4: 85% of four
        (397, 1, 396, 1),
        (900, 64, 100, 1),
    ],
)
def test_splits_that_fill_a_device(blocks_out: int, blocks_in: int, slots: int, splits: int) -> None:
    assert filling(blocks_out, blocks_in, slots) == splits


@pytest.mark.parametrize(
    ("resident", "num_warps", "registers"), [(6, 4, 80), (7, 4, 72), (8, 4, 64), (3, 4, 168), (1, 4, 248), (4, 8, 64)]
)
def test_registers_that_leave_room_for_the_resident_programs(resident: int, num_warps: int, registers: int) -> None:
    assert Launch(**{**LAUNCH, "resident": resident, "num_warps": num_warps}).maxnreg == registers
    assert resident * num_warps * 32 * registers <= 65536


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (["format_version"], 1, "format_version"),
        (["sources"], {"test": ""}, "sources"),
        (["shapes", 0, "source"], "elsewhere", "source"),
        (["shapes"], [], "shapes"),
        (["extra"], 1, "extra"),
        (["shapes", 0, "block"], 1, r"shapes\[0\]: block"),
        (["shapes", 0, "dtypes"], ["int16"], "dtypes"),
        (["shapes", 0, "dtypes"], ["int8"], r"launches\[8\].kernel: got 'compaction'"),
        (["shapes", 0, "in_features"], 0, "in_features"),
        (["shapes", 0, "out_features"], 4096.0, "out_features"),
        (["shapes", 0, "crossover"], 17, "crossover"),
        (["shapes", 0, "crossover"], 9, "launches"),
        (["shapes", 0, "crossover"], True, "crossover"),
        (["shapes", 0, "launches", "some"], LAUNCH, "some"),
        (["shapes", 0, "launches", "1", "warps"], 4, r"launches\[1\]: warps"),
        (["shapes", 0, "launches", "1", "kernel"], "dense", "kernel"),
        (["shapes", 0, "launches", "1", "block_in"], 8, "block_in"),
        (["shapes", 0, "launches", "1", "block_out"], 96, "block_out"),
        (["shapes", 0, "launches", "1", "splits"], 0, "splits"),
        (["shapes", 0, "launches", "1", "num_warps"], "4", "num_warps"),
        (["shapes", 0, "launches", "1", "num_stages"], 0, "num_stages"),
        (["shapes", 0, "launches", "1", "resident"], 17, "resident"),
    ],
    ids=lambda value: (
        ".".join(map(str, value)) if isinstance(value, list) and value and value not in (["int16"], ["int8"]) else None
    ),
)
def test_damaged_files_are_refused_by_name(place: list, value: object, named: str) -> None:
    data = deepcopy(FILE)
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(SponError, match=named):
        parse(data, "test.json")


@pytest.mark.parametrize("key", ["shapes", "sources", "format_version"])
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(SponError, match=f"{key}: got 'no such key'"):
        parse({name: value for name, value in FILE.items() if name != key}, "test.json")


def test_an_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "default.json"
    path.write_text("{")
    with pytest.raises(SponError, match="default.json"):
        read(path)
