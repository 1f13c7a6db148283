# SPDX-License-Identifier: Apache-2.0
"""``--dtype auto`` follows the machine in every command; what is stored stays what it was."""

import json
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors import safe_open
from test_commands import TEXT
from tiny_models import make_byte_tokenizer, make_tiny_llama

from spon_plugin import machine, read_adapter
from spon_transformers.loading import load_model
from spon_transformers.precision import load_precision

EMULATES = "This CPU emulates bfloat16: computing in float32."


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Llama in bfloat16."""
    path = tmp_path_factory.mktemp("models") / "half"
    make_tiny_llama().bfloat16().save_pretrained(path)
    make_byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(params=[True, False], ids=["native", "emulated"])
def computes(request, monkeypatch) -> str:
    """The dtype that the machine computes in with weights in bfloat16."""
    dtypes = frozenset([torch.bfloat16] if request.param else [])
    monkeypatch.setattr(machine, "native_dtypes", lambda: dtypes)
    return "bfloat16" if request.param else "float32"


def test_a_model_is_loaded_in_the_dtype_of_the_machine(base, computes):
    stored, model = load_model(str(base), stored=True, device="cpu"), load_model(str(base), device="cpu")
    assert stored.dtype == torch.bfloat16 and model.dtype == getattr(torch, computes)
    for name, weight in stored.state_dict().items():
        assert torch.equal(model.state_dict()[name].float(), weight.float())
    assert load_model(str(base), "bfloat16", "cpu").dtype == torch.bfloat16


def test_what_is_not_quantized_follows_the_machine(base, computes):
    assert load_precision(str(base), "int8", "auto").lm_head.weight.dtype == getattr(torch, computes)
    assert load_precision(str(base), "int8", "bfloat16").lm_head.weight.dtype == torch.bfloat16


def test_commands_follow_the_machine_say_so_and_record_it(base, computes, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    text = ["--text", tmp_path / "text.txt", "--window", "32"]

    def spon(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert code == 0, err
        assert (EMULATES in " ".join(err.split())) == (computes == "float32" and arguments[0] != "merge")
        return out

    spon("train", base, *text, "--windows", "4", "-o", tmp_path / "adapter")
    calibration = read_adapter(tmp_path / "adapter").fields.calibration
    assert calibration["dtype"] == calibration["training"]["dtype"] == computes
    spon("calibrate", base, *text, "--tokens", "320", "-o", tmp_path / "teal")
    assert read_adapter(tmp_path / "teal").fields.calibration["dtype"] == computes
    json.loads(spon("eval", base, "--adapter", tmp_path / "teal", *text, "--max-tokens", "64", "--json"))
    spon("analyze", base, "--adapter", tmp_path / "adapter", "--text", tmp_path / "text.txt", "--count", "3")
    short = ["--windows", "4", "--max-tokens", "64", "--calibration-tokens", "512", "--test", tmp_path / "text.txt"]
    for command, choice in (("compare", ["--methods", "teal", "--alpha", "off"]), ("ablate", ["--study", "sparsity"])):
        spon(command, base, *text, *short, *choice, "-o", tmp_path / command)
        assert json.loads((tmp_path / command / "settings.json").read_text())["dtype"] == computes
    spon("merge", tmp_path / "adapter", "-o", tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as merged:
        assert merged.get_tensor("model.layers.0.mlp.down_proj.weight").dtype == torch.bfloat16
