# SPDX-License-Identifier: Apache-2.0
"""A model whose files are at fault is refused in words, whatever library finds out."""

import errno
import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from transformers import dynamic_module_utils

from spon_plugin import SponError
from spon_transformers.loading import load_model, load_tokenizer, model_source, refused

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def copy(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "copy")


def change(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def cut(directory, name):
    whole = (directory / name).read_bytes()
    (directory / name).write_bytes(whole[: len(whole) // 2])


DAMAGE = {
    "weights cut": lambda path: cut(path, "model.safetensors"),
    "weights that are text": lambda path: (path / "model.safetensors").write_text("text"),
    "no weights": lambda path: (path / "model.safetensors").unlink(),
    "config cut": lambda path: cut(path, "config.json"),
    "config is a list": lambda path: (path / "config.json").write_text("[]"),
    "config not UTF-8": lambda path: (path / "config.json").write_bytes(b'{"a": "\xff"}'),
    "no such model type": lambda path: change(path, model_type="no-such", architectures=None),
    "heads that do not divide": lambda path: change(path, num_attention_heads=0),
    "sizes of words": lambda path: change(path, hidden_size="wide"),
    "another size": lambda path: change(path, hidden_size=96),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_refused_in_one_line(copy, damage):
    DAMAGE[damage](copy)
    with pytest.raises(SponError, match="model: got .*copy', expected a causal language model that") as refusal:
        load_model(str(copy), device="cpu")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[1", b"[]", b"\xff\xfe"], ids=["empty", "cut", "list", "not UTF-8"])
def test_a_damaged_tokenizer_is_refused(copy, name, content):
    (copy / name).write_bytes(content)
    with pytest.raises(SponError, match="model: got .*copy', expected a model with a tokenizer"):
        load_tokenizer(str(copy))


def test_a_tokenizer_that_fails_at_its_first_text_is_refused(copy):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": "long"}))
    with pytest.raises(SponError, match="model: got .*copy', expected a model with a tokenizer"):
        load_tokenizer(str(copy))


def test_memory_and_disk_are_not_the_models_fault():
    for error in (MemoryError(), torch.OutOfMemoryError(), OSError(errno.ENOSPC, "full"), SponError("said")):
        assert refused("m", "a model", error) is error
    for error in (OSError(errno.ENOENT, "gone"), KeyError("x"), SafetensorError("cut")):
        assert isinstance(refused("m", "a model", error), SponError)


def test_a_home_of_nobody_is_named():
    for name in ("~nobody_here/x", "x" * 300):
        with pytest.raises(SponError, match=f"model: got '{name[:150]}.*expected a path"):
            model_source(name)


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (copy / "own.py").write_text(CODE)
    change(copy, model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    with pytest.raises(SponError, match="it comes with code of its own.*--trust-remote-code"):
        load_model(str(copy), device="cpu")
    assert not (tmp_path / "modules").exists()
    assert type(load_model(str(copy), device="cpu", trust_remote_code=True)).__name__ == "OwnModel"
