# SPDX-License-Identifier: Apache-2.0
"""Every option of the loss against its formula written out, and in both ways to train."""

import math

import pytest
import torch
from masks import alphas_of
from tiny_models import make_tiny_llama
from torch import nn

from spon_peft.training import train_adapter
from spon_plugin import SponError, find_sites
from spon_plugin.decoder.block_states import BlockStates, spread_blocks
from spon_plugin.sparsifiers import get_sparsifier
from spon_plugin.training.distillation import kl_divergence, kl_reference
from spon_plugin.training.loop import Teacher, train_alphas
from spon_plugin.training.objective import Objective, hidden_distance
from spon_plugin.training.recipe import PRESETS, Recipe

WINDOWS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
RECIPE = Recipe(windows=8, window=32, batch_size=8, epochs=4, learning_rate=0.05)
OPTIONS = {
    "temperature": {"temperature": 2.0},
    "top-k": {"top_k": 16},
    "entropy": {"entropy_power": -1.0},
    "hidden": {"hidden_weight": 0.5, "hidden_blocks": 2},
    "all": {"temperature": 1.5, "top_k": 16, "entropy_power": 1.0, "hidden_weight": 0.1, "hidden_blocks": 1},
}


def states(n=13, width=8):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(n, width, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize("entropy_power", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 30, 31, 99])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_and_its_gradient_are_those_of_the_formula(temperature, top_k, entropy_power, chunk):
    torch.manual_seed(0)
    head = nn.Linear(8, 31).requires_grad_(False)
    student, teacher = states()
    options = {"top_k": top_k, "entropy_power": entropy_power}
    loss = kl_divergence(student, teacher, head, temperature, chunk, **options)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = kl_reference(head(student), head(teacher), temperature, **options)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4)


def test_one_bin_of_the_others_in_figures():
    teacher = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    student = torch.tensor([[0.4, 0.1, 0.2, 0.3]]).log()
    expected = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.1) + 0.2 * math.log(0.2 / 0.5)
    assert kl_divergence(student, teacher, top_k=2).item() == pytest.approx(expected, rel=1e-5)
    # What the student does among the others is its own affair.
    moved = torch.tensor([[0.4, 0.1, 0.45, 0.05]]).log()
    assert kl_divergence(moved, teacher, top_k=2).item() == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(student, teacher, top_k=2).item() < kl_divergence(student, teacher).item()


def test_tokens_that_the_teacher_is_unsure_of_count_more_or_less():
    sure, unsure = [0.0, -80.0], [0.0, 0.0]  # entropies 0 and log 2
    teacher, student = torch.tensor([sure, unsure]), torch.tensor([[0.0, -1.0], [0.0, -1.0]])
    one, two = (float(kl_reference(student[i : i + 1], teacher[i : i + 1])) for i in (0, 1))
    for power in (1.0, -2.0):
        loss = kl_divergence(student, teacher, entropy_power=power).item()
        assert loss == pytest.approx(one + (1 + math.log(2)) ** power * two, rel=1e-4)


def test_hidden_states_are_compared_relative_to_the_dense_ones():
    student = torch.tensor([[3.0, 4.0, 1.0, 0.0], [0.0, 2.0, 0.0, 0.0]])  # two tokens, two blocks of two
    teacher = torch.tensor([[3.0, 0.0, 1.0, 1.0], [0.0, 1.0, 2.0, 0.0]])
    expected = (16 / 9 + 1 / 2) / 2 + (1 / 1 + 4 / 4) / 2
    assert hidden_distance(student, teacher, 2).item() == pytest.approx(expected)


@pytest.mark.parametrize(("count", "chosen"), [(1, [3]), (2, [1, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])])
def test_blocks_lie_at_equal_distances_and_end_with_the_last(count, chosen):
    model = make_tiny_llama(num_hidden_layers=4)
    assert spread_blocks(model, count) == [f"model.layers.{index}" for index in chosen]


def test_the_states_of_blocks_stand_beside_the_output(tiny_llama):
    kept, hooks = BlockStates(tiny_llama, spread_blocks(tiny_llama, 2)), tiny_llama.model.layers[0]._forward_hooks
    before = len(hooks)
    both = kept.beside(lambda: tiny_llama(input_ids=WINDOWS).logits)
    assert len(hooks) == before
    hidden = tiny_llama(input_ids=WINDOWS, output_hidden_states=True)
    assert kept.width == 96 and both.shape == (8, 32, 256 + 96)
    torch.testing.assert_close(both[..., :256], hidden.logits)
    torch.testing.assert_close(both[..., 256:304], hidden.hidden_states[1])


def test_states_without_their_gradients_are_refused(tiny_llama):
    kept = BlockStates(tiny_llama, spread_blocks(tiny_llama, 1))
    weight = torch.ones((), requires_grad=True)
    with pytest.raises(SponError, match="hidden_weight: .*reentrant gradient checkpointing"):
        kept.beside(lambda: tiny_llama(input_ids=WINDOWS).logits * weight)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_loop_and_the_trainer_minimize_the_same(options, tmp_path):
    model = make_tiny_llama().double()
    fitted = get_sparsifier("teal").fit(model, find_sites(model), WINDOWS, 0.5)
    recipe = RECIPE.with_changes(**options)
    teacher = Teacher(model, WINDOWS, blocks=recipe.objective.block_states(model))
    alphas, losses = train_alphas(model, fitted, teacher, recipe)
    dense = model(input_ids=WINDOWS, output_hidden_states=True)
    with fitted.attach(model):
        sparse = model(input_ids=WINDOWS, output_hidden_states=True)
    given = {name: value for name, value in options.items() if not name.startswith("hidden")}
    first = kl_reference(sparse.logits[:, :-1].flatten(0, 1), dense.logits[:, :-1].flatten(0, 1), **given)
    if "hidden_weight" in options:
        # The two blocks of this model; the last of its hidden states is taken after the norm, so it comes by a hook.
        kept = recipe.objective.block_states(model)
        pair = [kept.beside(lambda: model(input_ids=WINDOWS).logits)]
        with fitted.attach(model):
            pair.append(kept.beside(lambda: model(input_ids=WINDOWS).logits))
        d, s = (x[:, :-1, 256:].flatten(0, 1).unflatten(-1, (-1, 48)) for x in pair)
        relative = (s - d).square().sum(-1) / d.square().sum(-1)
        first = first + options["hidden_weight"] * relative.mean(-1).sum()
    assert losses[0]["loss"] == pytest.approx(float(first) / (8 * 31), rel=1e-4)
    assert losses[-1]["loss"] < losses[0]["loss"]
    start = fitted.adapter({path: torch.zeros_like(alpha) for path, alpha in alphas.items()})
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    start.peft = {"base_model_name_or_path": "tiny", "target_modules": names}
    trained, expected = train_adapter(model, start, WINDOWS, recipe, tmp_path / "work")
    assert [row["loss"] for row in losses] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    for path, alpha in alphas_of(trained).items():
        torch.testing.assert_close(alphas[path], alpha, rtol=0, atol=1e-3 * float(alpha.abs().max()))


def test_a_teacher_without_the_states_that_a_recipe_asks_for_is_refused(tiny_llama):
    fitted = get_sparsifier("teal").fit(tiny_llama, find_sites(tiny_llama), WINDOWS, 0.5)
    with pytest.raises(SponError, match="teacher: got 'states of 0 blocks', expected 2"):
        train_alphas(tiny_llama, fitted, Teacher(tiny_llama, WINDOWS), RECIPE.with_changes(**OPTIONS["hidden"]))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", 0, "a number > 0"),
        ("temperature", math.inf, "a number > 0"),
        ("top_k", -1, "a whole number, 0 for the whole vocabulary"),
        ("top_k", 2.5, "a whole number, 0 for the whole vocabulary"),
        ("entropy_power", math.nan, "a finite number, 0 for equal weights"),
        ("hidden_weight", -0.1, "a number of at least 0"),
        ("hidden_blocks", 0, "a whole number of at least 1"),
    ],
)
def test_wrong_values_are_said(name, value, expected):
    for make in (lambda: Objective(**{name: value}), lambda: RECIPE.with_changes(**{name: value})):
        with pytest.raises(SponError, match=f"{name}: got {value}, expected {expected}"):
            make()


def test_more_blocks_than_there_are_is_said(tiny_llama):
    objective = Objective(hidden_weight=1.0, hidden_blocks=3)
    with pytest.raises(SponError, match="hidden_blocks: got 3, expected at least 1 and at most 2, the model's"):
        objective.block_states(tiny_llama)


def test_options_that_are_off_leave_no_trace_in_adapters():
    assert all(not set(vars(Objective())) & set(recipe.as_dict()) for recipe in PRESETS.values())
    recipe = RECIPE.with_changes(top_k=8, hidden_weight=0.5)
    kept = {"top_k": 8, "hidden_weight": 0.5}
    assert recipe.as_dict() == {**RECIPE.as_dict(), **kept} and Recipe(**recipe.as_dict()) == recipe
    assert recipe.objective == Objective(**kept)
