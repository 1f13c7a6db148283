# SPDX-License-Identifier: Apache-2.0
import json
import math
from dataclasses import replace

import pytest
import torch

from spon_plugin import find_sites, read_adapter
from spon_plugin.adapter.base import base_digest
from spon_plugin.files import claim
from spon_plugin.studies.ablation import DENSE
from spon_plugin.studies.recovery import Recovery
from spon_plugin.studies.recovery_plan import BEST, COMMON, TUNED, UNIFORM, Row, rows
from spon_plugin.studies.recovery_tables import gains, lines, markdown, over_seeds, records
from spon_plugin.studies.rows import RowStore

WINDOWS = torch.randint(0, 256, (20, 32), generator=torch.Generator().manual_seed(0))


def wanted():
    planned = rows([0.5], 2, 2, 32, paper=False, seeds=1)
    return [row for row in planned if row.label in (UNIFORM, "sensitivity", "rank 4", BEST, TUNED)]


@pytest.fixture
def study(tiny_llama):
    return Recovery(
        model=tiny_llama, sites=find_sites(tiny_llama), tests={"a": WINDOWS[:10]}, calibration=WINDOWS[10:],
        windows=lambda texts, window, count: WINDOWS[10:][:count],
    )  # fmt: skip


def test_rows_are_measured_once_and_become_a_table(study, tmp_path):
    store, seen = RowStore(tmp_path, {}), []
    study.done = lambda row, old: seen.append((row["name"], old))
    study.run(wanted(), store)
    study.run(wanted(), store)
    assert [old for _, old in seen] == [False] * 6 + [True] * 6
    found = [store.read(row.name) for row in wanted()]
    assert [Row.of(row) for row in found] == wanted()
    flat = records(found, store.read(DENSE))
    teal, best, rank = (next(r for r in flat if r["row"] == label) for label in (UNIFORM, BEST, "rank 4"))
    assert teal["recovered"] == 0 or teal["recovered"] is None
    gap = best["uniform_teal"] - best["dense"]
    if gap > 0:
        assert best["recovered"] == pytest.approx((best["uniform_teal"] - best["perplexity"]) / gap)
    assert rank["saved"] == pytest.approx(best["saved"], abs=0.03) and rank["masked"] > best["masked"] + 0.05
    assert len(lines(flat)) == 5 and markdown(found, store.read(DENSE)).count("\n| ") == 7
    kept = {path.name: path for path in (tmp_path / "adapters").iterdir()}
    assert sorted(kept) == sorted(row.name for row in wanted() if not row.extension and not row.deltas)
    adapters = [read_adapter(path) for path in kept.values()]
    assert all(adapter.fields.calibration["matched"] for adapter in adapters)
    assert {adapter.fields.base_digest for adapter in adapters} == {base_digest(study.model)}
    assert all(adapter.peft["target_modules"] for adapter in adapters)


def test_trials_are_compared_with_the_common_row_in_pairs():
    def result(*nll):
        return {"perplexity": 1.0, "windows": {"nll": list(nll)}}

    def row(label, test, recipe=True):
        return {"label": label, "sparsity": 0.5, "seed": 0, "recipe": {} if recipe else None, "tests": {"a": test}}

    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(12, generator=generator).tolist()
    dense = {"tests": {"a": result(*(2.0 + h for h in hard))}}
    uniform = row(UNIFORM, result(*(2.4 + h for h in hard)), recipe=False)
    common, better = (row(name, result(*(x + h for h in hard))) for name, x in ((COMMON, 2.2), ("rank 4", 2.1)))
    (line,) = gains([uniform, common, better], dense)
    expected = (math.exp(2.2) - math.exp(2.1)) / (math.exp(2.4) - math.exp(2.0))
    assert line[:3] == ["50%", "rank 4", "0"] and line[3].startswith(f"{expected:+.2f} [")
    low, high = map(float, line[3].partition("[")[2].rstrip("]").split(","))
    assert low == high == round(expected, 2)  # hard windows are hard for all
    assert gains([uniform, better], dense) == []


def test_shares_are_also_said_at_equal_bytes_where_teal_has_two_rows():
    hard = torch.rand(12, generator=torch.Generator().manual_seed(0)).tolist()

    def row(label, saved, loss, sparsity=0.5):
        test = {"perplexity": 10 * math.exp(loss), "saved": saved, "masked": saved, "tokens": 12}
        test["windows"] = {"nll": [math.log(10) + h - sum(hard) / 12 + loss for h in hard]}
        return {"label": label, "sparsity": sparsity, "seed": 0, "recipe": None, "seconds": {}, "tests": {"a": test}}

    def teal(saved):
        return 4 * saved**4  # nats over the dense model

    dense = row(DENSE, 0.0, 0.0)
    lower, upper = row(UNIFORM, 0.5, teal(0.5)), row(UNIFORM, 0.6, teal(0.6), 0.6)
    own = row("sensitivity", 0.47, teal(0.47) / 2)  # keeps more than TEAL at 50%
    at, to = math.exp(teal(0.47)), math.exp(teal(0.47) / 2)
    found = next(r for r in records([lower, upper, own], dense) if r["row"] == "sensitivity")
    assert found["recovered_at_equal_bytes"] == pytest.approx((at - to) / (at - 1))
    assert found["equal_low"] == pytest.approx(found["recovered_at_equal_bytes"], abs=0.01), "windows go together"
    assert found["recovered"] > found["recovered_at_equal_bytes"] + 0.1
    table = markdown([lower, upper, own], dense)
    assert "### At equal bytes" in table and f"| {found['recovered_at_equal_bytes']:.2f} [" in table
    assert "At equal bytes" not in markdown([lower, own], dense), "one row of TEAL says nothing of other bytes"


def test_several_seeds_become_their_mean_and_range():
    def row(label, loss, seed=0):
        test = {"perplexity": math.exp(loss), "saved": 0.5, "masked": 0.5, "tokens": 12}
        return {"label": label, "sparsity": 0.5, "seed": seed, "recipe": None, "seconds": {}, "tests": {"a": test}}

    dense, teal = row(DENSE, math.log(10)), row(UNIFORM, math.log(20))
    trained = [row(COMMON, math.log(perplexity), seed) for seed, perplexity in enumerate((12, 13, 15))]
    assert over_seeds(records([teal, *trained, row("sensitivity", math.log(18))], dense)) == [
        ["50%", COMMON, "3", "0.67 [0.50, 0.80]"]
    ]
    mixed = records([teal, *trained], dense)
    for record, share in zip((r for r in mixed if r["row"] == COMMON), (0.6, 0.5, None), strict=True):
        record["recovered_at_equal_bytes"] = share
    assert over_seeds(mixed)[0][-1] == "0.67 [0.50, 0.80]", "not known of every seed at equal bytes"
    assert "### Over seeds" in markdown([teal, *trained], dense)
    assert "### Over seeds" not in markdown([teal, trained[0]], dense)


def test_a_row_of_tuned_weights_leaves_the_model_as_it_was(study, tmp_path):
    store, before = RowStore(tmp_path, {}), {n: p.clone() for n, p in study.model.named_parameters()}
    tuned = next(row for row in wanted() if row.deltas)
    replace(study).run([], store)  # the dense model's row was made by an earlier command
    study.run([tuned], store)
    assert all(torch.equal(before[name], parameter) for name, parameter in study.model.named_parameters())
    row = store.read(tuned.name)
    assert row["deltas"] == tuned.deltas and row["tests"]["a"]["masked"] == pytest.approx(0.5, abs=0.05)
    assert row["unmasked"]["a"]["perplexity"] != store.read(DENSE)["tests"]["a"]["perplexity"]
    assert row["unmasked"]["a"]["kl"] > 0  # of the model as it was given


def test_a_row_that_another_process_is_at_is_left(study, tmp_path):
    store = RowStore(tmp_path, {})
    first, second = wanted()[:2]
    with claim(tmp_path / "rows" / f"{first.name}.json"):
        study.run([first, second], store)
    assert not store.has(first.name) and store.has(second.name)


def test_a_row_that_fails_does_not_end_the_rest(study, tmp_path):
    store = RowStore(tmp_path, {})
    broken = next(row for row in rows([0.5], 2, 2, 32) if row.label == "hidden states, 4 blocks")  # of two blocks
    with pytest.warns(UserWarning, match="hidden_blocks: got 4"):
        assert study.run([broken, wanted()[0]], store) == [broken.name]
    assert not store.has(broken.name) and store.has(wanted()[0].name)


def test_the_name_says_everything():
    every = rows([0.5, 0.6], 2, 2, 32)
    assert len({row.name for row in every}) == len(every)
    row = every[-1]
    assert replace(row, seed=1).name != row.name
    json.dumps([row.as_dict() for row in every])
