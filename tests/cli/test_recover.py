# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from commands import TEXT, run
from tiny_models import make_byte_tokenizer, make_tiny_llama

SMALL = ["--train-steps", "2", "--batch-size", "2", "--train-window", "64", "--window", "256", "--max-tokens", "1024"]

ONLY = "four times,uniform TEAL,centres trained"


def test_recover_writes_tables_and_a_plot_and_goes_on(tmp_path):
    make_tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    make_byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "second.txt").write_text(TEXT + TEXT)
    out, text = tmp_path / "out", tmp_path / "text.txt"
    call = ["recover", tmp_path / "model", "-o", out, "--text", text, "--text", tmp_path / "second.txt"]
    call += ["--test", text, *SMALL]
    call += ["--sparsity", "0.5", "--calibration-tokens", "512", "--seeds", "1"]
    code, _, err = run(*call, "--workers", "0")
    assert code == 2 and "expected rows that were measured" in err
    code, printed, err = run(*call, "--only", ONLY)
    assert code == 0, err
    assert printed.startswith("Recovery") and "50% uniform TEAL, seed 0" in err
    table = (out / "table.md").read_text()  # a narrow terminal wraps it
    assert 0 < table.index("| four times the steps |") < table.index("| uniform TEAL |"), (
        "in the order that was asked for"
    )
    assert "centres trained, too, four times the steps" in table and "sensitivity" not in table
    names = {path.name for path in out.iterdir()}
    assert names == {"table.md", "table.csv", "table.json", "recovery.png", "settings.json", "rows", "adapters"}
    code, _, err = run(*call, "--text", text, "--workers", "2")
    assert code == 2 and err.count("each text once") == 1 and "Traceback" not in err
    code, _, err = run(*call, "--only", "no such row")
    assert code == 2 and "only: got 'no such row'" in err and "'uniform TEAL'" in err
    (tmp_path / "third.txt").write_text(TEXT[::-1])
    code, _, err = run(*call, "--text", tmp_path / "third.txt", "--only", ONLY)
    assert code == 2 and "training_texts: got" in err, "rows of other texts"
    before = {path.name: path.read_bytes() for path in (out / "rows").iterdir()}
    code, printed, err = run(*call, "--only", ONLY, "--workers", "0", "--json")
    assert code == 0, err
    assert {path.name: path.read_bytes() for path in (out / "rows").iterdir()} == before
    tests = {row["test"] for row in json.loads(printed)["rows"]}
    assert tests == {"text.txt, 256", "text.txt, 128"}
    changed = [*call[:3], tmp_path / "other", *call[4:], "--only", "sensitivity", "--json"]
    code, printed, err = run(*changed, "--against", tmp_path / "nothing")
    assert code == 2 and "rows: got" in err and not (tmp_path / "other").exists()
    code, _, err = run(*changed, "--method", "sensitivity:2")
    assert code == 2 and "a number from 0 to 1" in err and not (tmp_path / "other").exists()
    code, printed, err = run(*changed, "--against", out, "--method", "sensitivity:0.8")
    assert code == 0, err
    rows = [json.loads(path.read_text()) for path in (tmp_path / "other" / "rows").iterdir()]
    assert {row.get("method") for row in rows} == {None, "sensitivity:0.8"}, "the dense model's, and its masks"
    found = json.loads(printed)["rows"]
    assert {row["row"] for row in found} == {"uniform TEAL", "sensitivity"}, "the other run's, and its own"
    assert all(row["recovered"] is not None for row in found)
    code, _, err = run(*changed, "--max-tokens", "512", "-o", tmp_path / "third", "--against", out)
    assert code == 2 and "against: got" in err


@pytest.mark.slow
def test_what_workers_cannot_do_is_an_error(tmp_path):
    make_tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    make_byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    text = tmp_path / "text.txt"
    call = ["recover", tmp_path / "model", "-o", tmp_path / "out", "--text", text, "--test", text, *SMALL]
    call += ["--sparsity", "0.5", "--calibration-tokens", "512", "--seeds", "1", "--only", "uniform TEAL"]
    code, _, err = run(*call)
    assert code == 0, err
    code, printed, _ = run(*call, "--max-tokens", "512", "--workers", "2", "--json")
    assert code == 2 and not printed, "the rows that are there are of other settings"
    code, _, err = run(*call[:-1], "hidden states", "--workers", "2")  # of four blocks, where there is one
    assert code == 2 and "rows: got" in err
