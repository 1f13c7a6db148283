# SPDX-License-Identifier: Apache-2.0
import csv
import io
import math

import pytest
import torch
from tiny_models import make_tiny_llama

from spon_plugin import SponError, find_sites, read_adapter
from spon_plugin.decoder.masked_linears import sparse_inputs
from spon_plugin.decoder.sparsity import SparsityCounter
from spon_plugin.studies.evaluation import perplexity
from spon_plugin.studies.frontier import Frontier, Key, keys
from spon_plugin.studies.frontier_tables import equal_bytes, hull, label, markdown, pair_lines, records
from spon_plugin.studies.quality_tables import UNCERTAIN
from spon_plugin.studies.rows import RowStore
from spon_plugin.studies.tables import csv_text
from spon_plugin.studies.token_bytes import Stored, TokenBytes, stored_bytes
from spon_plugin.training.recipe import Recipe

WINDOWS = torch.randint(0, 256, (20, 32), generator=torch.Generator().manual_seed(0))
RECIPE = Recipe(windows=4, window=32, batch_size=2, epochs=1, learning_rate=0.02)
WANTED = keys(["full", "half", "blocks"], [0, 0.5], ["off", "on"], lambda name: name != "blocks")


def load(name, loaded=None):
    """The model; with its weights rounded; and the same as if it were in blocks of 5 bits."""
    if loaded is not None:
        loaded.append(name)
    model = make_tiny_llama()
    held = stored_bytes(model.to(torch.bfloat16), find_sites(model))
    model = make_tiny_llama()
    if name != "full":
        for path in held.codes:
            model.get_submodule(path).weight.mul_(16).round_().div_(16)
    if name == "half":
        held = TokenBytes(
            {p: n // 2 for p, n in held.codes.items()}, held.rest, held.weights, held.unbiased, held.sites
        )
    return Stored(model, held if name != "blocks" else TokenBytes({}, 5 * held.weights // 8, held.weights))


def study(directory, **changes):
    given = {"calibration": WINDOWS[:8], "training": WINDOWS[:4], "tests": {"a.txt": WINDOWS[8:]}, "recipe": RECIPE}
    return Frontier(
        **{"load": lambda name, _adapter: load(name), "full": "full", "directory": directory, **given, **changes}
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    loaded = []
    rows = study(directory, load=lambda name, _adapter: load(name, loaded)).run(WANTED, RowStore(directory, {}))
    assert loaded == ["full", "half", "blocks"]  # each once, one after another
    return directory, rows


def test_rows_are_formats_times_shares_times_alphas():
    assert [key.name for key in WANTED] == [
        "full-0-off", "full-50-off", "full-50-on", "half-0-off", "half-50-off", "half-50-on", "blocks-0-off",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [0.5], ["on"]), "formats: got 'nothing'"),
        ((["a"], [], ["on"]), "sparsity: got 'nothing'"),
        ((["a"], [1.0], ["on"]), "sparsity: got 1.0"),
        ((["a"], [0.5], ["mean"]), "alpha: got 'mean', expected off or on"),
    ],
    ids=["formats", "sparsity", "range", "alpha"],
)
def test_wrong_rows_are_refused(arguments, message):
    with pytest.raises(SponError, match=message):
        keys(*arguments, lambda _name: True)


def test_a_row_is_the_formats_model_under_the_adapter_of_the_full_one(whole):
    directory, rows = whole
    row = next(row for row in rows if (row["format"], row["alpha"]) == ("half", "on"))
    adapter = read_adapter(directory / "adapter-50-on")
    stored, counter = load("half"), SparsityCounter()
    with sparse_inputs(stored.model, adapter.masks, counter=counter):
        assert row["texts"]["a.txt"]["perplexity"] == pytest.approx(perplexity(stored.model, WINDOWS[8:]))
    read = stored.bytes.read(counter.per_module(), adapter.masks)
    assert row["bytes_per_token"] == pytest.approx(read) and row["bits_per_weight"] == pytest.approx(
        8 * read / stored.bytes.weights
    )
    assert adapter.has_alpha and not read_adapter(directory / "adapter-50-off").has_alpha
    assert row["texts"]["a.txt"]["masked"] == pytest.approx(0.5, abs=0.05)
    dense = [row["texts"]["a.txt"] for row in rows if not row["sparsity"]]
    assert dense[0]["kl"] == pytest.approx(0, abs=1e-6) and dense[1]["kl"] > 1e-4 and dense[1]["kl"] == dense[2]["kl"]
    assert "saved" in row["texts"]["a.txt"] and "adapter" in row["seconds"]


def test_an_adapter_that_was_given_is_measured_in_every_format_that_skips_rows(whole, tmp_path):
    directory, rows = whole
    given = {"mine": read_adapter(directory / "adapter-50-on")}
    wanted = keys(["full", "half", "blocks"], [0], ["on"], lambda name: name != "blocks", given)
    assert [key.format for key in wanted if key.adapter] == ["full", "half"]
    measured = study(tmp_path, adapters=given, training=WINDOWS[:0]).run(wanted, RowStore(tmp_path, {}))
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "rows"}  # none was made
    for row in [row for row in measured if row["adapter"]]:
        own = next(r for r in rows if (r["format"], r["sparsity"], r["alpha"]) == (row["format"], 0.5, "on"))
        assert row["texts"] == own["texts"] and row["bytes_per_token"] == own["bytes_per_token"]
        assert label(row) == f"{row['format']} 50%, mine" and (row["sparsity"], row["alpha"]) == (0.5, "on")
    assert [record["adapter"] for record in records(measured)].count("mine") == 2
    other = {"mine": read_adapter(directory / "adapter-50-off")}
    again = keys(["full"], [0], ["on"], lambda _name: True, other)
    assert not {key.name for key in again if key.adapter} & {key.name for key in wanted}


def test_thresholds_meet_the_target_in_the_sparse_model(whole):
    directory, _ = whole
    for alpha in ("off", "on"):
        counter = SparsityCounter()
        model, adapter = load("full").model, read_adapter(directory / f"adapter-50-{alpha}")
        with sparse_inputs(model, adapter.masks, counter=counter):
            model(input_ids=WINDOWS[:8])
        dropped, codes = counter.per_module(), load("full").bytes.codes
        achieved = sum(dropped[path] * size for path, size in codes.items()) / sum(codes.values())
        assert achieved == pytest.approx(0.5, abs=0.01) and adapter.fields.calibration["matched"]


def test_an_interrupted_run_goes_on(whole, tmp_path):
    def stop(row, _old):
        if row["format"] == "half":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, done=stop).run(WANTED, RowStore(tmp_path, {}))
    kept = {file.name: file.read_bytes() for file in (tmp_path / "rows").iterdir()}
    assert len(kept) == 4
    old = []
    rows = study(tmp_path, done=lambda _row, there: old.append(there)).run(WANTED, RowStore(tmp_path, {}))
    assert old == [True] * 4 + [False] * 3
    assert all((tmp_path / "rows" / name).read_bytes() == content for name, content in kept.items())
    bare = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    assert bare == [{name: value for name, value in row.items() if name != "seconds"} for row in whole[1]]
    loaded = []
    study(tmp_path, load=lambda name, _adapter: load(name, loaded)).run(WANTED, RowStore(tmp_path, {}))
    assert loaded == []  # nothing was missing


def test_too_little_text_is_said_before_work(tmp_path):
    with pytest.raises(SponError, match="training windows: got 3, expected at least 4"):
        study(tmp_path, training=WINDOWS[:3]).run(WANTED, RowStore(tmp_path, {}))
    assert not list((tmp_path / "rows").iterdir())


def row(format, bits, perplexity, sparsity=0.0, stored=None, nll=None):
    windows = {} if nll is None else {"nll": nll}
    result = {"perplexity": perplexity, "windows": windows, "tokens": 64, "window": 8}
    return {
        "format": format, "sparsity": sparsity, "alpha": "off", "bits_per_weight": bits, "bytes_per_token": 100 * bits,
        "bytes_dense": 100 * (stored or bits), "texts": {"t": result}, "seconds": {"evaluation": 1.0},
    }  # fmt: skip


def test_the_hull_is_what_no_mix_of_rows_beats():
    e = math.exp
    rows = [row("a", 16, e(1.0)), row("b", 8, e(1.1)), row("c", 6, e(1.9)), row("d", 4, e(2.0)), row("e", 3, e(4.0))]
    rows += [row("f", 5, e(2.5)), row("g", 3.5, e(2.9)), row("h", 20, e(1.0)), row("i", 2, None)]
    assert [r["format"] for r in hull(rows, "t")] == ["e", "g", "d", "b", "a"]
    on_hull = {r["format"] for r in records(rows) if r["on_hull"]}
    assert on_hull == {"a", "b", "d", "e", "g"}
    for tried, kl in zip(rows, (0.0, 0.5, 0.6, 0.8, 0.9, 0.4, 0.85, 1e-9, 2.0), strict=True):
        tried["texts"]["t"]["kl"] = kl
    assert [r["format"] for r in hull(rows, "t", "kl")] == ["i", "e", "f"]  # a and h diverge by rounding alone


def test_rows_of_equal_bytes_are_compared_in_pairs():
    nll = [2.0 + 0.1 * i for i in range(10)]
    better = [value - 0.1 + 0.01 * (i % 2) for i, value in enumerate(nll)]
    rows = [row("int8", 4.1, 9.0, 0.5, 8.2, nll), row("int4", 4.0, 8.0, 0.0, 4.0, better)]
    rows += [row("int4", 3.99, 8.0, 0.1, 4.0, better), row("Q", 5.0, 8.0, 0.0, 5.0, nll)]
    pairs = [(label(first), label(second)) for first, second in equal_bytes(rows)]
    assert pairs == [("int8 50%", "int4"), ("int8 50%", "int4 10%")]
    line = pair_lines(rows)[0]
    assert line[:4] == ["int8 50%", "int4", "t", "4.10 and 4.00"] and line[4].startswith("-9.1% [")
    same = [row("int8", 4.1, 9.0, 0.5, 8.2, nll), row("int4", 4.0, 8.0, 0.0, 4.0, nll)]
    assert pair_lines(same)[0][4] == UNCERTAIN


def test_weights_that_are_rounded_for_masks_are_made_for_each_adapter(tmp_path):
    made = []

    def make(name, adapter):
        made.append((name, None if adapter is None else adapter.fields.sparsity))
        return load(name)

    wanted = [Key("half"), Key("half", 0.5), Key("full"), Key("full", 0.5)]
    study(tmp_path, load=make, is_fit=lambda name: name == "half").run(wanted, RowStore(tmp_path, {}))
    assert made == [("full", None), ("half", None), ("half", 0.5), ("full", None)]


def test_tables(whole):
    rows = whole[1]
    text = markdown(rows)
    assert text.startswith("| weights | bits a weight | MB a token | masked | a.txt: perplexity | a.txt: mean KL")
    assert "| half 50% + alpha |" in text and "| blocks | 5.00 |" in text
    read = list(csv.DictReader(io.StringIO(csv_text(records(rows)))))
    assert len(read) == len(rows) and {line["format"] for line in read} == {"full", "half", "blocks"}
    assert Key("int4", 0.4, "on").name == "int4-40-on"
