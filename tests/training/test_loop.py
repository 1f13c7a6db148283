# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import replace

import pytest
import torch
from masks import alphas_of
from tiny_models import make_tiny_llama
from transformers import get_cosine_schedule_with_warmup

from spon_peft.training import train_adapter
from spon_plugin import SponError, find_sites
from spon_plugin.sparsifiers import SPARSIFIERS, get_sparsifier
from spon_plugin.training.distillation import kl_reference
from spon_plugin.training.loop import Teacher, train_alphas
from spon_plugin.training.recipe import Recipe

WINDOWS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
RECIPE = Recipe(windows=8, window=32, batch_size=8, epochs=12, learning_rate=0.05)


@pytest.fixture
def tiny_llama():
    """In float64: a mask turns a difference in the last place into another loss after some steps, whoever trains."""
    return make_tiny_llama().double()


def fit(model, method="teal", sparsity=0.5):
    return get_sparsifier(method).fit(model, find_sites(model), WINDOWS, sparsity)


@pytest.mark.parametrize(
    ("method", "alpha_modules", "decay"),
    [("teal", "all", 0.0), ("teal", ["down_proj"], 2.0), ("sensitivity", "all", 0.0), ("sensitivity", "all", 2.0)],
)
def test_the_loop_trains_what_the_trainer_trains(tiny_llama, tmp_path, method, alpha_modules, decay):
    # Every step sees all windows, so the order in which either draws them is no matter.
    fitted, recipe = fit(tiny_llama, method), RECIPE.with_changes(weight_decay=decay)
    alphas, losses = train_alphas(tiny_llama, fitted, Teacher(tiny_llama, WINDOWS), recipe, alpha_modules)
    start = fitted.adapter({path: torch.zeros_like(alpha) for path, alpha in alphas.items()})
    start.peft = {"base_model_name_or_path": "tiny", "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    start.peft["target_modules"] += ["gate_proj", "up_proj", "down_proj"]
    trained, expected = train_adapter(tiny_llama, start, WINDOWS, recipe, tmp_path / "work")
    assert [row["loss"] for row in losses] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    assert losses[-1]["loss"] < (0.98 if method == "teal" else 1.0) * losses[0]["loss"]
    assert alphas.keys() == alphas_of(trained).keys()
    for path, alpha in alphas.items():
        torch.testing.assert_close(alpha, trained.masks[path].alpha, rtol=0, atol=1e-4 * float(alpha.abs().max()))


@pytest.mark.parametrize("method", [name for name in SPARSIFIERS if name != "teal-greedy"])
def test_alpha_helps_every_method(tiny_llama, method):
    # Where the masks leave little to do for alpha, more steps at a lower rate tell it from chance.
    sparsity, recipe = {
        "cats": (0.3, RECIPE),
        "sats": (0.3, RECIPE),
        "sensitivity": (0.6, RECIPE.with_changes(epochs=24, learning_rate=0.03)),
        "larosa": (0.5, RECIPE.with_changes(epochs=24, learning_rate=0.03)),
    }.get(method, (0.5, RECIPE))
    fitted, teacher = fit(tiny_llama, method, sparsity), Teacher(tiny_llama, WINDOWS)
    dense = tiny_llama(input_ids=WINDOWS).logits

    def divergence(alphas):
        with fitted.attach(tiny_llama, alphas):
            return float(kl_reference(tiny_llama(input_ids=WINDOWS).logits.flatten(0, 1), dense.flatten(0, 1)))

    alphas, _ = train_alphas(tiny_llama, fitted, teacher, recipe)
    assert alphas.keys() == set(fitted.modules)
    centered = method == "sensitivity"  # the means already: little is left for alpha
    assert divergence(alphas) < (0.97 if centered else 0.95) * divergence(None)


def test_the_same_seed_gives_the_same_alphas(tiny_llama):
    recipe, fitted, teacher = Recipe(8, 32, 2, 1, 0.05), fit(tiny_llama), Teacher(tiny_llama, WINDOWS)
    tiny_llama.train().requires_grad_(True)
    runs = [train_alphas(tiny_llama, fitted, teacher, recipe, seed=seed)[0] for seed in (3, 3, 4)]
    assert tiny_llama.training and all(parameter.requires_grad for parameter in tiny_llama.parameters())
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())
    path = "model.layers.0.mlp.down_proj"
    assert torch.equal(runs[0][path], runs[1][path]) and not torch.equal(runs[0][path], runs[2][path])


def test_a_model_whose_head_is_not_found_gives_full_logits(tiny_llama, monkeypatch):
    fitted, recipe = fit(tiny_llama), Recipe(8, 32, 8, 2, 0.05)
    expected = train_alphas(tiny_llama, fitted, Teacher(tiny_llama, WINDOWS), recipe)[1]
    monkeypatch.setattr("spon_plugin.training.loop.find_head", lambda *_: None)
    teacher = Teacher(tiny_llama, WINDOWS)
    assert teacher.states.shape == (8, 32, 256)
    losses = train_alphas(tiny_llama, fitted, teacher, recipe)[1]
    assert [row["loss"] for row in losses] == pytest.approx([row["loss"] for row in expected], rel=1e-4)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_the_schedule_is_that_of_transformers(warmup):
    recipe = Recipe(windows=40, window=8, batch_size=2, epochs=1, learning_rate=0.1, warmup=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(warmup * recipe.steps), recipe.steps)
    for step in range(recipe.steps):
        assert recipe.factor(step) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_rates_follow_the_thresholds():
    relative = Recipe(1, 8, 1, 1, learning_rate=0.1)
    assert relative.rate(0.5) == 0.05
    assert Recipe(1, 8, 1, 1, learning_rate=0.1, relative=False).rate(0.5) == 0.1


def test_weight_decay_takes_a_share_of_the_rate_whatever_the_threshold():
    for relative, scale in ((True, 0.5), (True, 1e-4), (False, 0.5)):
        recipe = Recipe(1, 8, 1, 1, learning_rate=0.1, relative=relative, weight_decay=2.0)
        assert recipe.rate(scale) * recipe.decay(scale) == pytest.approx(0.2)
    assert Recipe(1, 8, 1, 1, learning_rate=0.1, weight_decay=2.0).decay(0.0) == 2.0  # a layer of rate 0
    assert RECIPE.with_changes(weight_decay=0.0) == RECIPE
    for value in (-1.0, math.inf, math.nan):
        with pytest.raises(SponError, match=f"weight_decay: got {value}, expected a number of at least 0"):
            RECIPE.with_changes(weight_decay=value)


def test_weight_decay_makes_alphas_smaller(tiny_llama):
    fitted, teacher = fit(tiny_llama), Teacher(tiny_llama, WINDOWS)
    sizes = []
    for decay in (0.0, 2.0):
        alphas, _ = train_alphas(tiny_llama, fitted, teacher, replace(RECIPE, weight_decay=decay))
        sizes.append(sum(float(alpha.norm()) for alpha in alphas.values()))
    assert sizes[1] < 0.95 * sizes[0]


def test_wrong_use_is_said(tiny_llama):
    teacher = Teacher(tiny_llama, WINDOWS)
    with pytest.raises(SponError, match="alpha_modules: got .*o_proj.*that the method covers: down_proj, up_proj"):
        train_alphas(tiny_llama, fit(tiny_llama, "cats", 0.2), teacher, RECIPE, ["o_proj"])
    with pytest.raises(SponError, match="training windows: got 8, expected at least 9"):
        train_alphas(tiny_llama, fit(tiny_llama), teacher, Recipe(9, 32, 9, 1, 0.05))
