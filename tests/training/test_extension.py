# SPDX-License-Identifier: Apache-2.0
"""What is trained beside alpha, and thresholds that are matched on the way."""

import pytest
import torch

from spon_plugin import SponError, find_sites
from spon_plugin.decoder.masked_linears import sparse_inputs
from spon_plugin.sparsifiers import get_sparsifier
from spon_plugin.sparsifiers.match import match_method
from spon_plugin.studies.evaluation import evaluate
from spon_plugin.training.extension import Extended, Extension
from spon_plugin.training.loop import Teacher, distil, train_alphas
from spon_plugin.training.recipe import PRESETS, Recipe

WINDOWS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
RECIPE = Recipe(windows=8, window=32, batch_size=4, epochs=6, learning_rate=0.05, rematch=2)
KINDS = {
    "rank": Extension(rank=2),
    "gains": Extension(gain_rate=0.01),
    "centres": Extension(centers=True),
    "all": Extension(2, 0.5, 0.01, True),
}


def fit(model, method="sensitivity"):
    return get_sparsifier(method).fit(model, find_sites(model), WINDOWS, 0.5)


def logits(model, method, alphas=None):
    with torch.no_grad(), method.attach(model, alphas):
        return model(input_ids=WINDOWS).logits


def matcher(model, target):
    return lambda method, alphas: match_method(model, method, WINDOWS, target, alphas)


@pytest.mark.parametrize("extension", KINDS.values(), ids=KINDS)
def test_an_extension_learns_in_bfloat16(tiny_llama, extension):
    model = tiny_llama.to(torch.bfloat16)
    fitted, teacher = fit(model), Teacher(model, WINDOWS)
    method = Extended(fitted, model, find_sites(model), extension)
    _, losses, _ = distil(model, method, fitted, teacher, RECIPE, match=matcher(model, 0.5))
    assert losses[-1]["loss"] < losses[0]["loss"]


@pytest.mark.parametrize("extension", KINDS.values(), ids=KINDS)
def test_an_extension_begins_as_the_method_alone_and_learns(tiny_llama, extension):
    fitted, teacher = fit(tiny_llama), Teacher(tiny_llama, WINDOWS)
    method = Extended(fitted, tiny_llama, find_sites(tiny_llama), extension)
    torch.testing.assert_close(logits(tiny_llama, method), logits(tiny_llama, fitted), rtol=1e-4, atol=1e-4)
    before = {id(p): p.detach().clone() for p, _ in method.parameters(RECIPE)}
    alphas, losses, trained = distil(tiny_llama, method, fitted, teacher, RECIPE, match=matcher(tiny_llama, 0.5))
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert all(not torch.equal(before[id(p)], p) for p, _ in trained.parameters(RECIPE))
    measured = evaluate(tiny_llama, trained, WINDOWS, alphas=alphas)
    assert measured.masked == pytest.approx(0.5, abs=0.02)
    exported = trained.fitted()
    assert (exported is None) == bool(extension.rank or extension.gain_rate)
    if exported is not None:
        adapter = exported.adapter(alphas)
        with torch.no_grad(), sparse_inputs(tiny_llama, adapter.masks):
            served = tiny_llama(input_ids=WINDOWS).logits
        torch.testing.assert_close(served, logits(tiny_llama, trained, alphas), rtol=1e-4, atol=1e-4)
        shared = ("q_proj", "k_proj", "v_proj")
        centers = [adapter.masks[f"model.layers.0.self_attn.{name}"].center for name in shared]
        assert all(torch.equal(center, centers[0]) for center in centers)  # as a fused layer needs it


def test_the_low_rank_part_has_a_rate_of_its_own(tiny_llama):
    fitted, sites = fit(tiny_llama), find_sites(tiny_llama)
    whole, tenth = (
        [rate for _, rate in Extended(fitted, tiny_llama, sites, Extension(2, factor)).parameters(RECIPE)]
        for factor in (1.0, 0.1)
    )
    assert tenth == pytest.approx([0.1 * rate for rate in whole]) and min(tenth) > 0
    assert "rank_rate" not in Extension(2).as_dict() and Extension(2, 0.1).as_dict()["rank_rate"] == 0.1


def test_the_bytes_of_a_low_rank_part_are_counted(tiny_llama):
    sites = find_sites(tiny_llama)
    linears = [m for name, m in tiny_llama.named_modules() if name.endswith("_proj")]
    expected = 3 * sum(m.in_features + m.out_features for m in linears)
    method = Extended(fit(tiny_llama), tiny_llama, sites, Extension(rank=3))
    assert method.extra_reads == expected == Extension(rank=3).extra_reads(sites)
    measured = evaluate(tiny_llama, method, WINDOWS)
    assert measured.masked - measured.saved == pytest.approx(expected / sum(m.weight.numel() for m in linears))


def test_thresholds_are_matched_on_the_way_and_then_stay(tiny_llama):
    assert RECIPE.rematch_steps == [4, 8] and RECIPE.steps == 12
    assert PRESETS["fast"].rematch_steps == [] and "rematch" not in PRESETS["fast"].as_dict()
    assert Recipe(**RECIPE.as_dict()) == RECIPE
    fitted, seen = fit(tiny_llama), []

    def match(method, alphas):
        seen.append({path: alpha.clone() for path, alpha in alphas.items()})
        return match_method(tiny_llama, method, WINDOWS, 0.4, alphas)  # far from where they begin

    trained = distil(tiny_llama, fitted, fitted, Teacher(tiny_llama, WINDOWS), RECIPE, match=match)
    assert len(seen) == 2 and any(not torch.equal(seen[0][path], seen[1][path]) for path in seen[0])
    again = match_method(tiny_llama, fitted, WINDOWS, 0.4, seen[1])
    path = "model.layers.0.mlp.down_proj"
    assert not torch.equal(trained.method.masks[path].threshold, fitted.masks[path].threshold)
    torch.testing.assert_close(trained.method.masks[path].threshold, again.masks[path].threshold, rtol=0.1, atol=0)


def test_wrong_use_is_said(tiny_llama):
    with pytest.raises(SponError, match="rematch: got 2, expected 0"):
        train_alphas(tiny_llama, fit(tiny_llama), Teacher(tiny_llama, WINDOWS), RECIPE)
    with pytest.raises(SponError, match="centers: got 'trained', expected a method that has some, unlike teal"):
        Extended(fit(tiny_llama, "teal"), tiny_llama, find_sites(tiny_llama), Extension(centers=True))
    with pytest.raises(SponError, match="rematch: got -1"):
        RECIPE.with_changes(rematch=-1)
