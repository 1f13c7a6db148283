# SPDX-License-Identifier: Apache-2.0
"""Adapters that travel: model cards, `spon push`, and hub ids wherever a directory is accepted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import run
from fake_hub import fake_hub

from spon_plugin import SponError, read_adapter
from spon_plugin.adapter.base import base_digest
from spon_plugin.adapter.hub import adapter_directory, hub_id_of, is_hub_id, on_hub

SMALL = ["--windows", 4, "--window", 32, "--seed", 1]


@pytest.fixture(scope="module")
def trained(tiny_model_dir, tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("hub")
    (work / "text.txt").write_text("".join(f"Line {i} of a text with {i * i} in it.\n" for i in range(600)))
    code, _, err = run("train", tiny_model_dir, "--text", work / "text.txt", *SMALL, "-o", work / "spon50")
    assert code == 0, err
    return work / "spon50"


def card_of(directory: Path) -> tuple[dict, str]:
    _, front, body = (directory / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def test_training_writes_a_model_card_without_paths_of_this_machine(trained, tiny_model_dir):
    front, body = card_of(trained)
    assert front["library_name"] == "peft" and "spon" in front["tags"]
    assert "base_model" not in front  # a directory is no name for others
    assert str(tiny_model_dir.parent) not in body
    digest = read_adapter(trained).fields.base_digest
    assert f"`{tiny_model_dir.name}`, weights {digest[:12]}" in body
    assert "50.0%" in body and "tokens of text.txt" in body and "spon eval BASE" in body


def test_eval_puts_its_table_into_the_card(trained, tiny_model_dir):
    text = trained.parent / "text.txt"
    arguments = ["eval", tiny_model_dir, "--adapter", trained, "--text", text, "--window", 64, "--max-tokens", 256]
    before = card_of(trained)
    for _ in range(2):  # the second in place of the first
        code, out, err = run(*arguments, "--card", "--json")
        assert code == 0, err
    dense = json.loads(out)["perplexity"]["dense"]
    front, body = card_of(trained)
    rows = [line for line in body.splitlines() if line.startswith("| text.txt | 64 |")]
    assert len(rows) == 1 and f"{dense:.2f}" in rows[0]
    assert front == before[0] and body.partition("## What it costs")[0] == before[1].partition("## What it costs")[0]


def test_merged_models_have_a_card_that_says_what_they_need(trained, tmp_path):
    assert run("merge", trained, "-o", tmp_path / "merged")[0] == 0
    front, body = card_of(tmp_path / "merged")
    assert front["library_name"] == "transformers" and "needs the package spon-plugin" in body


def test_another_base_of_the_same_shape_is_refused(trained, tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "tuned")
    code, _, err = run("merge", trained, "--model", tmp_path / "tuned", "-o", tmp_path / "merged")
    known, other = read_adapter(trained).fields.base_digest[:12], base_digest(model)[:12]
    assert code == 2 and f"base_digest: got '{other}, that of {tmp_path / 'tuned'}', expected {known}, that of" in err


def test_the_digest_of_a_base_does_not_depend_on_how_it_was_loaded(tiny_llama):
    tiny_llama.to(torch.bfloat16)
    digest = base_digest(tiny_llama)
    assert digest == base_digest(tiny_llama.to(torch.float32))
    assert base_digest(tiny_llama.to(torch.float16)) == ""


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("org/name", True), ("name", False), ("./org/name", False), ("a/b/c", False), ("/a", False), ("org/", False)],
)
def test_what_a_hub_id_is(name, is_one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name) is is_one
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_hub_id(name)  # a directory of that name comes first


def test_a_snapshot_of_the_cache_has_the_id_of_its_repository(tmp_path):
    path = tmp_path / "models--org--a--b" / "snapshots" / "0123"
    assert hub_id_of(path) == "org/a--b"
    assert hub_id_of(tmp_path) is None


def test_without_a_hub_an_id_is_an_error_in_a_sentence():
    assert not on_hub("org/name")
    with pytest.raises(SponError, match="adapter: got 'org/name', expected an adapter directory, or the id of one on"):
        adapter_directory("org/name")


def test_an_adapter_that_names_a_directory_is_not_pushed(trained):
    code, _, err = run("push", trained, "org/spon50")
    assert code == 2 and "expected the base model's id on the hub" in err and "Add --base org/name." in err


@pytest.mark.slow
def test_an_adapter_goes_to_a_hub_and_comes_back(trained, tiny_model_dir, tmp_path):
    """In a process of its own: huggingface_hub reads the hub's address when it is imported."""
    (tmp_path / "commands.json").write_text(json.dumps([
        ["push", str(trained), "org/spon50", "--base", "org/base"],
        ["inspect", "org/spon50"],
        ["merge", "org/spon50", "-o", str(tmp_path / "merged")],
        ["train", "org/spon50", "--text", str(trained.parent / "text.txt"), *map(str, SMALL), "-o",
         str(tmp_path / "more")],
    ]))  # fmt: skip
    code = """
import json, sys
from spon_cli.main import main
for arguments in json.load(open(sys.argv[1])):
    sys.argv = ["spon", *arguments, "--json"]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, arguments
from peft import AutoPeftModelForCausalLM
AutoPeftModelForCausalLM.from_pretrained("org/spon50")
"""
    with fake_hub() as hub:
        hub.files["org/base"] = {path.name: path.read_bytes() for path in tiny_model_dir.iterdir()}
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
                       "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}  # fmt: skip
        command = [sys.executable, "-c", code, str(tmp_path / "commands.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        pushed = hub.files["org/spon50"]
    assert sorted(pushed) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "loss.csv", "loss.png"]
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    front = yaml.safe_load(pushed["README.md"].decode().split("---\n", 2)[1])
    assert front["base_model"] == "org/base" and front["base_model_relation"] == "adapter"
    assert read_adapter(tmp_path / "more").base_model == "org/base"
    assert read_adapter(tmp_path / "more").fields.base_digest == read_adapter(trained).fields.base_digest


def test_the_home_of_nobody_is_refused_in_words():
    with pytest.raises(SponError, match=r"adapter: got '~nobody_here/spon50', expected an adapter directory"):
        adapter_directory("~nobody_here/spon50")
