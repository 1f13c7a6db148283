# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from commands import TEXT, run
from tiny_models import make_byte_tokenizer, make_tiny_llama

from spon_cli.commands import compare

SMALL = ["--windows", "4", "--window", "64", "--max-tokens", "256", "--calibration-tokens", "512"]


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "test.txt").write_text(TEXT[: len(TEXT) // 2])
    return ["--text", tmp_path / "text.txt", "--test", tmp_path / "test.txt"]


def test_compare_writes_tables_resumes_and_refuses_other_settings(tiny_model_dir, texts, tmp_path):
    out = tmp_path / "compare"
    arguments = ["compare", tiny_model_dir, "-o", out, *texts, *SMALL, "--methods", "teal,cats", "--alpha", "off,on"]
    (tmp_path / "l.jsonl").write_text("\n".join(f'{{"text": "some {i} words"}}' for i in range(9)))
    arguments += ["--lambada", tmp_path / "l.jsonl"]
    code, printed, err = run(*arguments, "--sparsity", "0.3")
    assert code == 0, err
    assert "Beside the dense model" in printed and "LAMBADA" in (out / "table.md").read_text()
    assert "TEAL" in printed and "teal 30%, alpha on" in err
    assert {path.name for path in out.iterdir()} >= {"table.md", "table.csv", "table.json", "plot.png", "settings.json"}
    before = {path.name: path.read_bytes() for path in (out / "rows").iterdir()}
    code, printed, err = run(*arguments, "--sparsity", "0.3,0.5", "--json")
    assert code == 0, err
    table = json.loads(printed)
    assert {row["sparsity"] for row in table["rows"]} == {0.3, 0.5} and len(table["rows"]) == 6
    assert [row["method"] for row in table["skipped"]] == ["cats", "cats"]
    assert all((out / "rows" / name).read_bytes() == content for name, content in before.items())
    assert "teal 30%" not in err  # was there
    code, _, err = run(*arguments, "--sparsity", "0.3", "--seed", "1")
    assert code == 2 and "Choose another --output" in err
    code, _, err = run(*arguments, "--sparsity", "0.3", "--learning-rate", "0.5")
    assert code == 2 and "recipe" in err
    for other in (["--window", "32"], ["--target-modules", "down_proj"], ["--passages", "8"]):
        code, _, err = run(*arguments, "--sparsity", "0.3", *other)
        assert code == 2 and {"--passages": "last_words"}.get(other[0], other[0][2:].replace("-", "_")) + ": got" in err


def test_rows_of_a_method_with_a_parameter_stand_beside_it(tiny_model_dir, texts, tmp_path):
    methods = ["wanda-2:4", "sensitivity:0.8", "sensitivity", "sensitivity:1", "sensitivity:0.80"]
    out, wanted = tmp_path / "compare", ["--methods", ",".join(methods), "--alpha", "off", "--sparsity", "0.5,0.6"]
    code, printed, err = run("compare", tiny_model_dir, "-o", out, *texts, *SMALL, *wanted, "--json")
    assert code == 0, err
    order = [*["sensitivity"] * 2, *["sensitivity:0.8"] * 2, *["sensitivity:1"] * 2, "wanda-2:4"]  # that is 50% alone
    assert [row["method"] for row in json.loads(printed)["rows"]] == order
    assert "Sensitivity, blend 0.8" in (out / "table.md").read_text()


def test_compare_refuses_rows_of_another_model(tiny_model_dir, texts, tmp_path):
    make_tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / tiny_model_dir.name)
    make_byte_tokenizer().save_pretrained(tmp_path / tiny_model_dir.name)
    arguments = ["-o", tmp_path / "out", *texts, *SMALL, "--methods", "teal", "--alpha", "off", "--sparsity", "0.3"]
    code, _, err = run("compare", tiny_model_dir, *arguments)
    assert code == 0, err
    code, _, err = run("compare", tmp_path / tiny_model_dir.name, *arguments)
    assert code == 2 and "weights: got" in err


def test_compare_refuses_a_text_that_is_too_short_for_the_calibration(tiny_model_dir, texts, tmp_path):
    code, _, err = run("compare", tiny_model_dir, "-o", tmp_path / "out", *texts, "--calibration-tokens", "99999")
    assert code == 2 and "calibration_tokens: got 99999, expected at most" in " ".join(err.split())


def test_a_dense_model_that_diverges_gives_tables_all_the_same(tmp_path):
    result = {"perplexity": None, "saved": 0.5, "masked": 0.5, "window": 4, "tokens": 4}
    rows = [{"method": "dense", "texts": {"t": result}}]
    rows.append({"method": "teal", "sparsity": 0.5, "alpha": "off", "texts": {"t": result}, "seconds": {}})
    rows[1] |= {"extra_bytes_per_layer": 0.0, "seconds": {"calibration": 1.0}}
    (tmp_path / "settings.json").write_text("{}")
    compare.write_tables(rows, tmp_path)
    compare.show(rows)
    assert "dense diverged" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--methods", "tael"], "method: got 'tael'"),
        (["--sparsity", "half"], "sparsity: got 'half'"),
        (["--protocol", "none"], "protocol: got 'none'"),
        (["--calibration-tokens", "8"], "calibration_tokens: got 8"),
        (["--test", "missing.txt"], "missing.txt"),
    ],
    ids=["method", "sparsity", "protocol", "tokens", "text"],
)
def test_compare_refuses_wrong_input_before_work_starts(tmp_path, changes, message):
    code, _, err = run("compare", "no-model", "-o", tmp_path / "compare", *changes)
    assert code == 2 and message in err.replace("\n", "")
    assert not (tmp_path / "compare").exists()


def test_compare_help_has_examples():
    code, printed, _ = run("compare", "--help")
    assert code == 0 and "spon compare ./model -o compare --methods teal,wina,wanda" in " ".join(printed.split())


def test_the_plot_shows_every_row_within_its_limits(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    def row(method, alpha, saved, perplexity):
        texts = {"t": {"perplexity": perplexity, "saved": saved, "masked": saved}}
        return {"method": method, "sparsity": round(saved, 1), "alpha": alpha, "texts": texts}

    rows = [{"method": "dense", "texts": {"t": {"perplexity": 10.0}}}, row("teal", "off", 0.4, 13.0)]
    rows += [row("teal", "off", 0.6, 30.0), row("teal", "on", 0.39, 11.0), row("fixed-neuron", "off", 0.5, 5000.0)]
    monkeypatch.setattr(plt, "close", lambda _figure: None)
    compare.plot(rows, tmp_path / "plot.png")
    (axes,) = plt.gcf().axes
    low, high = axes.get_ylim()
    assert 9 < low < 10 and 30 < high <= 60
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert drawn == {"TEAL, alpha off": [13.0, 30.0], "TEAL, alpha trained": [11.0], "dense": [10.0, 10.0]}
    monkeypatch.undo()
    plt.close("all")
