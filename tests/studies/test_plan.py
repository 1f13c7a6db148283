# SPDX-License-Identifier: Apache-2.0
"""Studies: what they vary, that rows are measured once and kept, and what the tables say."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import make_tiny_llama

from spon_plugin import SponError, find_sites
from spon_plugin.adapter.base import weights_digest
from spon_plugin.studies.ablation import DENSE, Ablation, Trial, describe, plan
from spon_plugin.studies.evaluation import share_recovered
from spon_plugin.studies.plan import STUDIES, Setup
from spon_plugin.studies.plan_tables import markdown, records, recovered
from spon_plugin.studies.rows import RowStore
from spon_plugin.studies.tables import csv_text
from spon_plugin.training.recipe import Recipe

RECIPE = Recipe(windows=4, window=16, batch_size=2, epochs=1, learning_rate=0.05)
MIX = ("a", "b")


@pytest.fixture
def sites(tiny_llama):
    return find_sites(tiny_llama)


@pytest.fixture
def setup(sites):
    return Setup(sites, MIX, 0.5, 32, RECIPE)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 16), generator=torch.Generator().manual_seed(seed))


def bench(model, sites, **changes) -> Ablation:
    pools = {(MIX, 16): tokens(8), (("a",), 16): tokens(8, 1), (("b",), 16): tokens(8, 2)}
    pools[MIX, 32] = tokens(8, 4).view(4, 32)
    return Ablation(model=model, sites=sites, pools=pools, window=16, tests={"test": tokens(4, 3)}, **changes)


def leaves(trial: Trial) -> set[str]:
    return {path.rpartition(".")[2] for path in trial.carriers}


def test_locations_are_all_linears_and_each_role_of_a_site(setup):
    found = {point.label: leaves(point.trial) for point in STUDIES["location"](setup).points}
    assert found == {
        "all": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "attn_in (q_proj, k_proj, v_proj)": {"q_proj", "k_proj", "v_proj"},
        "attn_out (o_proj)": {"o_proj"},
        "mlp_in (gate_proj, up_proj)": {"gate_proj", "up_proj"},
        "mlp_out (down_proj)": {"down_proj"},
    }


def test_layers_and_halves_part_the_blocks(setup):
    every = set(setup.trial.carriers)
    for parts in (STUDIES["layer"](setup).points, STUDIES["halves"](setup).points[1:]):
        assert len(parts) == 2
        first, last = (set(point.trial.carriers) for point in parts)
        assert first | last == every and not first & last
        assert all(".layers.0." in path for path in first)
    assert STUDIES["layer"](setup).points[0].trial.recipe.windows == RECIPE.windows // 2


def test_token_study_compares_passes_and_steps(setup):
    points = STUDIES["tokens"](replace(setup, recipe=replace(RECIPE, windows=16), calibration_tokens=1024)).points
    by = {name: [p for p in points if p.series == name] for name in dict.fromkeys(p.series for p in points)}
    assert [p.x for p in by["TEAL, thresholds"]] == [64, 256, 1024, 4096]
    assert all(not p.trial.carriers for p in by["TEAL, thresholds"])
    assert [p.trial.recipe.windows for p in by["SPON, one pass"]] == [2, 4, 8, 16, 32]
    assert [p.trial.recipe.steps for p in by["SPON, one pass"]] == [1, 2, 4, 8, 16]
    assert [(p.trial.recipe.windows, p.trial.recipe.steps) for p in by["SPON, same steps"]] == [
        (2, 8),
        (4, 8),
        (8, 8),
        (16, 8),
    ]


@pytest.mark.parametrize("study", ["rate", "domain", "sparsity"])
def test_other_studies_vary_one_thing(setup, study):
    points = STUDIES[study](setup).points
    trials = [point.trial for point in points if point.trial.carriers]
    varied = {
        "rate": [trial.recipe.learning_rate for trial in trials],
        "domain": [trial.texts for trial in trials],
        "sparsity": [trial.sparsity for trial in trials],
    }
    expected = {
        "rate": pytest.approx([0.0125, 0.025, 0.05, 0.1, 0.2]),
        "domain": [("a",), ("b",), MIX],
        "sparsity": [0.7, 0.75, 0.8, 0.85, 0.9],
    }
    for name, values in varied.items():
        assert values == expected[name] if name == study else len(set(values)) == 1


def test_losses_are_compared_at_one_sparsity_of_the_sparse_model(setup):
    points = STUDIES["loss"](setup).points
    assert all(point.trial.matched and point.trial.carriers == setup.trial.carriers for point in points)
    options = {point.label: point.trial.recipe.loss_options for point in points}
    assert options["KL"] == {} and points[0].trial == replace(setup.trial, matched=True)
    assert options["top 64 and one bin"] == {"top_k": 64} and options["temperature 2"] == {"temperature": 2.0}
    assert options["hidden states, 4 blocks"] == {"hidden_weight": 1.0, "hidden_blocks": 2}  # all that this model has
    assert sorted(o["entropy_power"] for o in options.values() if "entropy_power" in o) == [-1.0, 1.0]
    assert len({point.trial.masks.name for point in points}) == 1
    assert "entropy power -1" in describe(points[-1].trial)


def test_every_loss_gives_a_row_of_its_own_and_rows_come_back_as_trials(tiny_llama, sites, setup, tmp_path):
    trials = [point.trial for point in STUDIES["loss"](setup).points]
    rows = bench(tiny_llama, sites).run(trials, RowStore(tmp_path, {}))
    # And the dense model's and the masks', but this vocabulary of 256 has no 1024 likeliest.
    assert len({row["tests"]["test"]["perplexity"] for row in rows.values()}) == len(trials) + 1
    assert [Trial.of(rows[trial.name]) for trial in trials] == trials


def test_domain_needs_two_texts(setup):
    with pytest.raises(SponError, match="at least two training texts"):
        STUDIES["domain"](replace(setup, texts=("a",)))


def test_generalization_has_mixes_sites_windows_and_decay(setup):
    points = STUDIES["generalization"](replace(setup, texts=("a", "b", "c"))).points
    by = {point.label: point.trial for point in points}
    assert [trial.texts for trial in list(by.values())[:7]] == [
        ("a",), ("b",), ("c",), ("b", "c"), ("a", "c"), ("a", "b"), ("a", "b", "c")
    ]  # fmt: skip
    assert by["all but b"].texts == ("a", "c")
    assert leaves(by["mix, mlp_out (down_proj)"]) == {"down_proj"}
    for length in (8, 32):
        recipe = by[f"mix, windows of {length}"].recipe
        assert recipe.windows * recipe.window == RECIPE.windows * RECIPE.window and recipe.steps == RECIPE.steps
    assert [trial.recipe.weight_decay for label, trial in by.items() if "decay" in label] == [1.0, 4.0]
    mix = [trial for label, trial in by.items() if label.startswith("mix")]
    assert len({trial.masks.name for trial in mix}) == 1 and all(trial.texts == ("a", "b", "c") for trial in mix)
    assert len(STUDIES["generalization"](setup).points) == len(points) - 4


def test_a_trial_of_longer_windows_trains_on_its_own_pool_over_the_same_masks(tiny_llama, sites, setup, tmp_path):
    longer = replace(setup.trial, recipe=replace(RECIPE, window=32, windows=2, batch_size=1))
    rows = bench(tiny_llama, sites).run([setup.trial, longer], RowStore(tmp_path, {}))
    assert len(rows) == 4  # dense, the masks alone of both, both
    assert rows[longer.name]["training_tokens"] == rows[setup.trial.name]["training_tokens"] == 64
    assert rows[longer.name]["tests"] != rows[setup.trial.name]["tests"]


def test_no_study_asks_for_more_than_the_pool(setup):
    for build in STUDIES.values():
        for point in build(setup).points:
            assert point.trial.calibration_tokens <= setup.pool * RECIPE.window
            recipe = point.trial.recipe
            assert recipe is None or recipe.windows * recipe.window <= setup.pool * RECIPE.window


def test_position_0_is_masked_or_dense_at_one_sparsity(tiny_llama, sites, setup, tmp_path):
    points = STUDIES["prefix"](replace(setup, calibration_tokens=128)).points
    assert [(p.series, p.trial.dense_prefix) for p in points] == [("TEAL", 0), ("SPON", 0), ("TEAL", 1), ("SPON", 1)]
    assert all(point.trial.matched for point in points)
    pools = {(MIX, 16): tokens(8)}
    own = Ablation(model=tiny_llama, sites=sites, pools=pools, window=16, tests={"test": tokens(8)})
    rows = own.run([point.trial for point in points], RowStore(tmp_path / "rows", {}))
    found = [rows[point.trial.name]["tests"]["test"] for point in points]
    # On the windows that they were matched on.
    assert [row["masked"] for row in found] == [pytest.approx(0.5, abs=0.005)] * 4
    assert len({row["perplexity"] for row in found}) == 4
    assert [Trial.of(json.loads(json.dumps(rows[point.trial.name]))) for point in points] == [p.trial for p in points]
    with pytest.raises(SponError, match="method: got 'topk', expected one with thresholds"):
        replace(own, method="topk").check([points[0].trial])


def test_a_plan_has_every_trial_once_after_its_masks(setup):
    trials = [p.trial for name in ("location", "halves", "sparsity") for p in STUDIES[name](setup).points]
    planned = plan(trials)
    names = [trial.name for trial in planned]
    assert len(set(names)) == len(names) == 1 + 5 + 2 + 2 * 5
    for trial in planned:
        assert names.index(trial.masks.name) <= names.index(trial.name)
    # Everything that changes a figure changes the name.
    base = setup.trial
    others = [
        replace(base, sparsity=0.6),
        replace(base, texts=("a",)),
        replace(base, calibration_tokens=64),
        replace(base, carriers=base.carriers[:1]),
        replace(base, recipe=replace(RECIPE, epochs=2)),
        replace(base, recipe=replace(RECIPE, weight_decay=1.0)),
        base.masks,
    ]
    assert len({trial.name for trial in [base, *others]}) == 8


def test_rows_are_kept_and_an_interrupted_run_goes_on(tiny_llama, sites, setup, tmp_path):
    trials = [point.trial for point in STUDIES["halves"](setup).points]
    told = []

    def stop(row, old):
        told.append((row["name"], old))
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(tiny_llama, sites, done=stop).run(trials, RowStore(tmp_path / "rows", {}))
    assert [old for _, old in told] == [False] * 3
    told.clear()
    again = bench(tiny_llama, sites, done=lambda row, old: told.append((row["name"], old)))
    rows = again.run(trials, RowStore(tmp_path / "rows", {}))
    assert [old for _, old in told] == [True] * 3 + [False] * 2
    whole = bench(tiny_llama, sites).run(trials, RowStore(tmp_path / "whole", {}))
    assert {n: r["tests"] for n, r in rows.items()} == {n: r["tests"] for n, r in whole.items()}
    assert len(list((tmp_path / "rows" / "rows").glob("*.json"))) == 5


def test_a_trial_trains_on_the_start_of_what_a_longer_one_has(tiny_llama, sites, setup, tmp_path):
    short = replace(setup.trial, recipe=replace(RECIPE, windows=2))
    alone = bench(tiny_llama, sites).run([short], RowStore(tmp_path / "alone", {}))
    beside = bench(tiny_llama, sites).run([short, setup.trial], RowStore(tmp_path / "beside", {}))
    assert alone[short.name]["training_tokens"] == 32
    assert alone[short.name]["tests"] == beside[short.name]["tests"]
    assert beside[setup.trial.name]["tests"] != beside[short.name]["tests"]


def test_alpha_closes_some_of_the_gap_of_kl(tiny_llama, sites, setup, tmp_path):
    trial = replace(setup.trial, recipe=replace(RECIPE, epochs=20))
    row = bench(tiny_llama, sites).run([trial], RowStore(tmp_path, {}))[trial.name]
    assert row["loss"]["last"] < row["loss"]["first"]
    assert row["tests"]["test"]["masked"] == pytest.approx(0.5, abs=0.06)


def test_short_texts_and_unknown_methods_are_refused_before_work(tiny_llama, sites, setup, tmp_path):
    store = RowStore(tmp_path, {})
    long = replace(setup.trial, recipe=replace(RECIPE, windows=9))
    with pytest.raises(SponError, match=r"text a \+ b: got '8 windows', expected at least 9 windows of 16 tokens"):
        bench(tiny_llama, sites).run([setup.trial, long], store)
    with pytest.raises(SponError, match="method: got 'best'"):
        bench(tiny_llama, sites, method="best").run([setup.trial], store)
    for method in ("cats", "wanda-2:4"):
        with pytest.raises(SponError, match="expected one that covers every linear at every sparsity: teal, "):
            bench(tiny_llama, sites, method=method).run([setup.trial], store)
    with pytest.raises(SponError, match="windows: got 1, expected at least 2"):
        bench(tiny_llama, sites).run([replace(setup.trial, recipe=replace(RECIPE, windows=1))], store)
    assert store.all() == []


def test_tables_say_what_the_rows_say(setup):
    study = STUDIES["sparsity"](replace(setup, sparsity=0.7))
    perplexities = iter(range(20, 60))
    rows = {DENSE: {"tests": {"test": {"perplexity": 10.0, "tokens": 64, "window": 16}}}}
    for point in study.points:
        rows[point.trial.name] = {
            **point.trial.as_dict(),
            "tests": {"test": {"perplexity": float(next(perplexities)), "masked": 0.7}},
            "seconds": {"training": 3.0} if point.trial.carriers else {},
        }
    teal, spon = study.points[:2]
    assert recovered(teal, rows, "test") is None
    assert recovered(spon, rows, "test") == pytest.approx((20 - 21) / (20 - 10))
    table = markdown(study, rows)
    assert "| 70% | SPON | 21.00 | 20.00 | -0.10 | 70.0% | 3 |" in table and "dense 10.00" in table
    flat = records(study, rows)
    assert len(flat) == 10 and flat[1]["perplexity"] == 21.0 and flat[1]["masks_alone"] == 20.0
    assert csv_text(flat).count("\n") == 11
    assert json.loads(json.dumps(flat)) == flat
    rows[spon.trial.name]["tests"]["test"]["perplexity"] = None
    assert recovered(spon, rows, "test") is None and "diverged" in markdown(study, rows)


@pytest.mark.parametrize(
    ("dense", "masks", "other", "share"),
    [(10, 20, 15, 0.5), (10, 20, 25, -0.5), (10, 10, 9, None), (10, 9, 8, None), (None, 20, 15, None)],
    ids=["half", "worse", "no-gap", "masks-better", "missing"],
)
def test_share_recovered(dense, masks, other, share):
    assert share_recovered(dense, masks, other) == share


def test_the_digest_of_a_models_weights_tells_models_apart(tiny_llama):
    digest = weights_digest(tiny_llama)
    assert digest == weights_digest(make_tiny_llama())
    other = make_tiny_llama()
    other.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert len({digest, weights_digest(other), weights_digest(make_tiny_llama(num_hidden_layers=1))}) == 3
