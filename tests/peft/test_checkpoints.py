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
from spon_plugin.calibration.measurement import measure_sparsity
from spon_plugin.decoder.sites import find_sites
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


@pytest.fixture(scope="module")
def matched(tmp_path_factory):
    """A run that brings thresholds to the target twice, at its third and sixth step of nine: directory and result."""
    work = tmp_path_factory.mktemp("matched") / "work"
    return work, trained_to_target(work)


def trained_to_target(work, **options):
    torch.manual_seed(0)
    taus = {"model.layers.0.mlp.down_proj": 0.1, "model.layers.1.mlp.down_proj": 0.3}
    masks = {path: Mask(torch.tensor([tau]), None, torch.zeros(24)) for path, tau in taus.items()}
    adapter = Adapter(SponFields(sparsity=0.4), masks, {"target_modules": ["down_proj"]})
    recipe = preset("fast").with_changes(windows=18, window=16, batch_size=2, rematch=2)
    windows = torch.randint(1, 64, (18, 16))
    assert recipe.rematch_steps == [3, 6]
    return train_adapter(tiny(), adapter, windows, recipe, work, save_every=4, **options)[0], windows


def test_thresholds_are_brought_to_the_target_by_one_factor(matched):
    _, (adapter, windows) = matched
    first, second = (float(mask.threshold) for mask in adapter.masks.values())
    assert second == pytest.approx(3 * first) and first != pytest.approx(0.1, rel=0.01)
    model = tiny()
    sites = find_sites(model, sorted(adapter.masks))
    assert measure_sparsity(model, sites, adapter.masks, windows)[0] == pytest.approx(0.4, abs=0.02)


def test_a_resumed_run_has_the_thresholds_of_its_checkpoint(matched, tmp_path):
    work, (adapter, _) = matched
    (checkpoint,) = work.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-9"
    whole = trained_to_target(tmp_path / "whole", progress=keeping_at(5, tmp_path / "whole"))
    assert whole[0].digest == adapter.digest
    shutil.rmtree(tmp_path / "whole" / "checkpoint-9")
    (tmp_path / "kept").rename(tmp_path / "whole" / "checkpoint-4")
    assert trained_to_target(tmp_path / "whole")[0].digest == adapter.digest


def keeping_at(step, work):
    """Keeps the checkpoint that is there after a step."""

    def progress(done, _total, _note):
        if done == step:
            (checkpoint,) = work.glob("checkpoint-*")
            shutil.copytree(checkpoint, work.parent / "kept")

    return progress


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
