# SPDX-License-Identifier: Apache-2.0
"""What `spon eval` says beside perplexity: how far from the dense model, or from another, predictions are."""

import json

import pytest
import torch
from commands import run
from tiny_models import make_byte_tokenizer, make_tiny_llama

WINDOWS = ["--window", "32", "--max-tokens", "320"]
VARIANTS = ("dense", "teal", "spon")


@pytest.fixture
def far(tmp_path):
    """A model of the same tokenizer with other weights in a layer."""
    model = make_tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3.0)
    model.save_pretrained(tmp_path / "far")
    make_byte_tokenizer().save_pretrained(tmp_path / "far")
    return tmp_path / "far"


def test_eval_compares_with_the_dense_model_or_with_a_reference(tiny_model_dir, adapter, text, far):
    (far / "passages.jsonl").write_text("\n".join(json.dumps({"text": f"{i} quick brown foxes"}) for i in range(20)))
    call = ["eval", tiny_model_dir, "--adapter", adapter, "--text", text, *WINDOWS]
    code, out, err = run(*call, "--json", "--lambada", far / "passages.jsonl", "--passages", "9")
    assert code == 0, err
    own = json.loads(out)
    assert {name: found["passages"] for name, found in own["last_word"].items()} == dict.fromkeys(VARIANTS, 9)
    assert own["reference"] == "dense" and own["quality"]["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    assert own["quality"]["spon"]["kl"] > 1e-4 and len(own["quality"]["spon"]["windows"]["kl"]) == 10
    low, high = own["quality"]["teal"]["intervals"]["kl_99"]
    assert low <= own["quality"]["teal"]["kl_99"] <= high
    assert own["changes"]["perplexity"]["certain"] in (True, False)
    code, out, err = run(*call, "--json", "--reference", far)
    assert code == 0, err
    other = json.loads(out)
    assert other["perplexity"] == own["perplexity"] and other["quality"]["dense"]["kl"] > 0.01
    code, out, err = run(*call, "--reference", far, "--lambada", far / "passages.jsonl")
    assert "LAMBADA" in out and "Last words of 20 passages" in out
    assert code == 0 and "alpha's change" in out and "same top" in out
    assert f"Beside{far}" in "".join(out.split())  # a long path takes several lines


def test_a_reference_with_another_tokenizer_is_refused(tiny_model_dir, adapter, text, far):
    stored = json.loads((far / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary["e"], vocabulary["o"] = vocabulary["o"], vocabulary["e"]
    (far / "tokenizer.json").write_text(json.dumps(stored))
    call = ["eval", tiny_model_dir, "--adapter", adapter, "--text", text, *WINDOWS, "--reference", far]
    code, _, err = run(*call)
    assert code == 2 and "expected a model with the same tokenizer" in " ".join(err.split())
