# SPDX-License-Identifier: Apache-2.0
"""A training run goes on from the newest checkpoint that is whole."""

import json
import shutil

import pytest
import torch
from spon_models import tiny

from spon_peft.checkpoints import check_plan, newest_whole
from spon_peft.training import train_adapter
from spon_plugin import Adapter, SponError, SponFields
from spon_plugin.adapter.mask import Mask
from spon_plugin.training.recipe import preset


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run with one whole checkpoint; to be read only."""
    work = tmp_path_factory.mktemp("run")
    recipe = preset("fast").with_changes(windows=4, window=8, batch_size=2, epochs=1)
    path = "model.layers.0.mlp.down_proj"
    masks = {path: Mask(torch.tensor([0.1]), None, torch.zeros(24))}
    adapter = Adapter(SponFields(), masks, {"target_modules": [path]})
    train_adapter(tiny(), adapter, torch.randint(1, 64, (4, 8)), recipe, work, save_every=1)
    return work


def test_a_recipe_that_moves_thresholds_is_refused_before_work(tmp_path):
    path, windows = "model.layers.0.mlp.down_proj", torch.ones(2, 8, dtype=torch.int64)
    adapter = Adapter(SponFields(), {path: Mask(torch.ones(1), None, torch.zeros(24))}, {"target_modules": [path]})
    with pytest.raises(SponError, match="rematch: got 2, expected 0 to train an adapter"):
        train_adapter(tiny(), adapter, windows, preset("fast").with_changes(rematch=2), tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.fixture
def two(run, tmp_path):
    """A run with two checkpoints, both whole."""
    (whole,) = run.glob("checkpoint-*")
    shutil.copytree(whole, tmp_path / "checkpoint-9")
    shutil.copytree(whole, tmp_path / "checkpoint-10")
    return tmp_path


def test_the_newest_is_the_one_of_the_highest_step(two):
    assert newest_whole(two) == str(two / "checkpoint-10")


def test_there_may_be_none(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "start").mkdir()
    assert newest_whole(tmp_path) is None


@pytest.mark.parametrize("how", ["truncated", "empty", "missing"])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json",
             "rng_state.pth"],
)  # fmt: skip
def test_one_that_was_stopped_while_it_was_written_is_passed_over(two, name, how):
    file = two / "checkpoint-10" / name
    data = file.read_bytes()
    file.unlink()
    if how != "missing":
        file.write_bytes(data[: len(data) // 2] if how == "truncated" else b"")
    assert newest_whole(two) == str(two / "checkpoint-9")


def test_a_plan_is_kept_whole_and_a_damaged_one_is_named(tmp_path):
    check_plan(tmp_path, {"seed": 0})
    check_plan(tmp_path, {"seed": 0})
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(SponError, match="seed: got 1, expected 0, as in the checkpoints"):
        check_plan(tmp_path, {"seed": 1})
    (tmp_path / "plan.json").write_text(json.dumps({"seed": 0})[:4])
    with pytest.raises(SponError, match=r"plan\.json: .* expected valid JSON"):
        check_plan(tmp_path, {"seed": 0})
