# SPDX-License-Identifier: Apache-2.0
import csv
import io
import json
import math

import pytest
import torch
from tiny_models import make_tiny_llama

from spon_plugin import SponError, find_sites
from spon_plugin.sparsifiers import get_sparsifier
from spon_plugin.studies.comparison import Comparison, Key, keys
from spon_plugin.studies.comparison_tables import markdown, records, recovered, recovered_at_equal_bytes
from spon_plugin.studies.evaluation import perplexity
from spon_plugin.studies.rows import RowStore
from spon_plugin.studies.tables import csv_text
from spon_plugin.training.recipe import Recipe

WINDOWS = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(0))
RECIPE = Recipe(windows=4, window=32, batch_size=2, epochs=1, learning_rate=0.02)
WANTED = keys(["teal", "cats", "wanda-2:4"], [0.3, 0.5], ["off", "mean", "on", "down_proj"])


@pytest.fixture(scope="module")
def model():
    return make_tiny_llama()


def bench(model, **changes):
    tests = {"a.txt": WINDOWS[8:], "b.txt": WINDOWS[6:8]}
    given = {"calibration": WINDOWS[:8], "training": WINDOWS[:4], "recipe": RECIPE, **changes}
    return Comparison(model=model, sites=find_sites(model), tests=tests, **given)


def figures(rows):
    """Rows without the seconds, which differ from run to run."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def rows(model, tmp_path_factory):
    return bench(model).run(WANTED, RowStore(tmp_path_factory.mktemp("whole"), {}))


def test_rows_are_what_the_parts_give(model, rows):
    by_name = {row["method"] if row["method"] == "dense" else Key(*list(row.values())[:3]).name: row for row in rows}
    assert by_name["dense"]["texts"]["a.txt"]["perplexity"] == pytest.approx(perplexity(model, WINDOWS[8:]))
    teal = get_sparsifier("teal").fit(model, find_sites(model), WINDOWS[:8], 0.5)
    with teal.attach(model):
        assert by_name["teal-50-off"]["texts"]["b.txt"]["perplexity"] == pytest.approx(perplexity(model, WINDOWS[6:8]))
    off, mean, on, down = (by_name[f"teal-50-{alpha}"] for alpha in ("off", "mean", "on", "down_proj"))
    assert len({row["texts"]["a.txt"]["perplexity"] for row in (off, mean, on, down)}) == 4
    assert off["texts"]["a.txt"]["masked"] == pytest.approx(0.5, abs=0.02) == off["texts"]["a.txt"]["saved"]
    assert "loss" not in off and "loss" not in mean and set(on["loss"]) == {"first", "last"}
    assert set(off["seconds"]) == {"calibration", "evaluation"}
    assert set(mean["seconds"]) == {"calibration", "mean", "evaluation"}
    assert set(on["seconds"]) == {"calibration", "training", "evaluation"}
    without, every, one = (row["extra_bytes_per_layer"] for row in (off, on, down))
    assert one - without == 4 * 48 and every - without == 4 * sum(
        module.out_features for name, module in model.model.layers[0].named_modules() if name.endswith("proj")
    )


def test_a_row_that_cannot_be_is_said_and_the_others_are_measured(rows):
    skipped = {(row["method"], row["sparsity"]): row["skipped"] for row in rows if "skipped" in row}
    assert skipped.keys() == {("cats", 0.5), ("wanda-2:4", 0.3)}
    assert "leaves attention and gates dense" in skipped["cats", 0.5]
    assert len(rows) == 1 + len(WANTED)


@pytest.mark.parametrize(
    ("alpha", "training", "message"),
    [
        ("dwon_proj", 4, "alpha: got 'dwon_proj', expected off, mean, on, or one of down_proj, gate_proj"),
        ("all", 4, "alpha: got 'all', expected off, mean, on"),
        ("on", 3, "training windows: got 3, expected at least 4. Use more text"),
    ],
    ids=["typo", "all", "short"],
)
def test_wrong_use_is_said_before_work(model, tmp_path, alpha, training, message):
    small = bench(model)
    small.training = WINDOWS[:training]
    with pytest.raises(SponError, match=message):
        small.run(keys(["teal"], [0.5], ["off", alpha]), RowStore(tmp_path, {}))
    assert not list((tmp_path / "rows").iterdir())


def test_an_interrupted_run_goes_on_and_ends_at_the_same_rows(model, rows, tmp_path):
    measured = []

    def stop(row, old):
        measured.append((row["method"], old))
        if len(measured) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(model, done=stop).run(WANTED, RowStore(tmp_path, {"seed": 0}))
    assert len(list((tmp_path / "rows").glob("*.json"))) == 4
    measured.clear()
    again = bench(model, done=lambda row, old: measured.append((row["method"], old)))
    resumed = again.run(WANTED, RowStore(tmp_path, {"seed": 0}))
    assert [old for _, old in measured] == [True] * 4 + [False] * (len(WANTED) - 3)
    assert figures(resumed) == figures(rows)


def test_an_interruption_while_writing_leaves_no_row(tmp_path, monkeypatch):
    store = RowStore(tmp_path, {})
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write("row", {"a": 1})
    assert not store.has("row") and store.all() == []


@pytest.mark.parametrize(
    "other",
    [{"seed": 1, "texts": ["a"]}, {"seed": 0}, {"seed": 0, "texts": ["a"], "dtype": "auto"}],
    ids=["changed", "missing", "added"],
)
def test_rows_under_other_settings_are_refused(tmp_path, other):
    RowStore(tmp_path, {"seed": 0, "texts": ("a",)})
    RowStore(tmp_path, {"seed": 0, "texts": ("a",)})
    with pytest.raises(SponError, match="as for the rows in .*Choose another --output"):
        RowStore(tmp_path, other)


def test_tables(rows):
    text = markdown(rows)
    lines = text.splitlines()
    assert lines[0].startswith("| sparsity | method | alpha | a.txt (dense ")
    measured = [row for row in rows if row["method"] != "dense" and "skipped" not in row]
    heads = [index for index, line in enumerate(lines) if line.startswith("| sparsity | method | alpha |")]
    assert len(heads) == 2  # perplexities, and what lies beside them
    for first, last in zip(heads, [heads[1], len(lines)], strict=True):
        assert sum(line.startswith(("| 30%", "| 50%")) for line in lines[first:last]) == len(measured)
    assert "| 50% | Wanda 2:4 | trained, down_proj |" in text
    assert "- CATS at 50%: sparsity: got 0.5" in text
    read = list(csv.DictReader(io.StringIO(csv_text(records(rows)))))
    assert len(read) == len(records(rows)) == 2 * len(measured)
    assert {row["text"] for row in read} == {"a.txt", "b.txt"}
    assert json.loads(json.dumps(records(rows))) == records(rows)


def test_the_share_of_teals_gap():
    def row(method, alpha, perplexity):
        return {"method": method, "sparsity": 0.5, "alpha": alpha, "texts": {"t": {"perplexity": perplexity}}}

    dense = {"method": "dense", "texts": {"t": {"perplexity": 10.0}}}
    teal, spon, wina = row("teal", "off", 20.0), row("teal", "on", 14.0), row("wina", "off", 22.0)
    rows = [dense, teal, spon, wina]
    assert recovered(spon, rows, "t") == pytest.approx(0.6)
    assert recovered(wina, rows, "t") == pytest.approx(-0.2)
    assert recovered(teal, rows, "t") is None
    assert recovered(spon, [dense, spon], "t") is None
    assert recovered(row("wina", "on", None), rows, "t") is None


def test_the_share_of_teals_gap_at_equal_bytes():
    def row(method, alpha, perplexity, saved, sparsity=0.5):
        result = {"perplexity": perplexity, "saved": saved}
        return {"method": method, "sparsity": sparsity, "alpha": alpha, "texts": {"t": result}}

    def loss(saved):  # nats: a power of what is saved
        return 2 * saved**3

    def teal(saved):
        return row("teal", "off", 10 * math.exp(loss(saved)), saved, round(saved, 1))

    dense = {"method": "dense", "texts": {"t": {"perplexity": 10.0}}}
    rows = [dense, teal(0.52), teal(0.25), teal(0.4)]
    at = 10 * math.exp(loss(0.46))
    for share in (0.3, -0.2):
        own = row("wina", "on", at - share * (at - 10), 0.46)
        assert recovered_at_equal_bytes(own, rows, "t") == pytest.approx(share)
    below = 10 * math.exp(loss(0.1))
    assert recovered_at_equal_bytes(row("wina", "on", below, 0.1), rows, "t") == pytest.approx(0, abs=1e-6)
    assert recovered_at_equal_bytes(row("wina", "on", 12.0, 0.6), rows, "t") is None
    assert recovered_at_equal_bytes(row("wina", "on", None, 0.3), rows, "t") is None
    assert recovered_at_equal_bytes(row("wina", "on", 12.0, -0.1), rows, "t") is None
    assert recovered_at_equal_bytes(row("wina", "on", 12.0, 0.3), rows[:2], "t") is None
    assert recovered_at_equal_bytes(rows[1], rows, "t") is None


def test_a_diverged_row_is_shown(rows, tmp_path):
    broken = json.loads(json.dumps(rows))
    for result in broken[1]["texts"].values():
        result["perplexity"] = float("nan")
    store = RowStore(tmp_path, {})
    store.write("row", broken[1])
    assert "| diverged |" in markdown([broken[0], store.read("row")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["tael"], [0.5], ["on"]), "method: got 'tael'"),
        ((["teal"], [1.5], ["on"]), "sparsity: got 1.5"),
        (([], [0.5], ["on"]), "methods: got 'nothing'"),
        ((["teal"], [0.5], []), "alpha: got 'nothing'"),
    ],
    ids=["method", "sparsity", "no-method", "no-alpha"],
)
def test_wrong_rows_are_refused_before_work_starts(arguments, message):
    with pytest.raises(SponError, match=message):
        keys(*arguments)
