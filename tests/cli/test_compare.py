# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from test_commands import TEXT, run

SMALL = ["--windows", "4", "--window", "64", "--max-tokens", "256", "--calibration-tokens", "512"]


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "test.txt").write_text(TEXT[: len(TEXT) // 2])
    return ["--text", tmp_path / "text.txt", "--test", tmp_path / "test.txt"]


def test_compare_writes_tables_resumes_and_refuses_other_settings(tiny_model_dir, texts, tmp_path):
    out = tmp_path / "compare"
    arguments = ["compare", tiny_model_dir, "-o", out, *texts, *SMALL, "--methods", "teal,cats", "--alpha", "off,on"]
    code, printed, err = run(*arguments, "--sparsity", "0.3")
    assert code == 0, err
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
