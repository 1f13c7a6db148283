# SPDX-License-Identifier: Apache-2.0
"""Every method that fits the format, and one of another package, in every command and in lm-eval."""

import json
import sys

import pytest
import torch
from commands import run
from strangers import NAME, install
from test_commands import SMALL, TEXT

from spon_plugin import read_adapter
from spon_plugin.sparsifiers import adapter_methods

CALIBRATION = ["--tokens", "2048", "--window", "64"]


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path / "site"))
    yield NAME
    sys.modules.pop("a_stranger", None)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.mark.parametrize("method", [name for name in adapter_methods() if name not in ("teal", "teal-greedy")])
def test_adapters_of_every_method_are_written_trained_and_evaluated(tiny_model_dir, text, tmp_path, method):
    masks, trained = tmp_path / "masks", tmp_path / "trained"
    code, out, err = run(
        "calibrate", tiny_model_dir, "--method", method, *CALIBRATION, "--text", text, "-o", masks, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["method"] == method and not read_adapter(masks).has_alpha
    code, _, err = run("train", tiny_model_dir, "--method", method, *SMALL, "--text", text, "-o", trained)
    assert code == 0, err
    adapter = read_adapter(trained)
    assert adapter.fields.calibration["method"] == method
    assert any(mask.alpha.any() for mask in adapter.masks.values())
    code, out, err = run(
        "eval", tiny_model_dir, "--adapter", trained, "--text", text, "--window", "64", "--max-tokens", "512", "--json"
    )
    assert code == 0 and "spon" in json.dumps(json.loads(out)), err


def test_a_method_of_another_package_needs_no_other_edit(stranger, tiny_model_dir, text, tmp_path):
    from spon_lm_eval.model import SponHFLM

    trained, table = tmp_path / "trained", tmp_path / "table"
    code, _, err = run(
        "calibrate", tiny_model_dir, "--method", stranger, *CALIBRATION, "--text", text, "-o", tmp_path / "masks"
    )
    assert code == 0, err
    code, _, err = run("train", tiny_model_dir, "--method", stranger, *SMALL, "--text", text, "-o", trained)
    assert code == 0, err
    arguments = ["--windows", "4", "--window", "64", "--max-tokens", "256", "--calibration-tokens", "512"]
    code, out, err = run(
        "compare", tiny_model_dir, "--methods", f"teal,{stranger}", "--sparsity", "0.5", "--alpha", "off",
        *arguments, "--text", text, "--test", text, "-o", table, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert {row["method"] for row in json.loads(out)["rows"]} >= {"teal", stranger}
    masks = SponHFLM(spon=str(trained), device="cpu", dtype="float32", alpha="off")
    lm = SponHFLM(spon=str(trained), device="cpu", dtype="float32")
    requests = [(("a", "b"), [1, 2, 3], [4, 5, 6])]
    with torch.no_grad():
        assert lm._loglikelihood_tokens(requests) != masks._loglikelihood_tokens(requests)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "best"], "method: got 'best', expected one of teal"),
        (["--method", "cats"], "method: got 'cats', expected one that masks inputs by thresholds"),
        (["--method", "wina", "--allocation", "greedy"], "allocation: got 'greedy', expected nothing beside --method"),
    ],
    ids=["unknown", "for-evaluation-only", "two-that-disagree"],
)
@pytest.mark.parametrize("command", ["calibrate", "train"])
def test_wrong_methods_are_named(tiny_model_dir, tmp_path, command, arguments, message):
    code, _, err = run(command, tiny_model_dir, *arguments, "-o", tmp_path / "out")
    assert code == 2 and message in " ".join(err.split()) and not (tmp_path / "out").exists()
