# SPDX-License-Identifier: Apache-2.0
"""A model that is loaded to be sparsified is dense, and all of it is there."""

import re
import shutil

import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file
from spon_models import sparse
from tiny_models import make_byte_tokenizer, make_tiny_llama
from transformers import AutoModelForCausalLM

from spon_lm_eval.arguments import SponArguments
from spon_lm_eval.layers import with_adapter
from spon_plugin import SponError, find_sites
from spon_transformers.loading import load_model
from spon_transformers.precision import load_precision


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A merged checkpoint, of whose linears only one kind is sparse."""
    path = tmp_path_factory.mktemp("models") / "merged"
    sparse(target_modules=["down_proj"]).merge_and_unload().save_pretrained(path)
    make_byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def damaged(tiny_model_dir, tmp_path):
    """A checkpoint without two of its tensors."""
    path = shutil.copytree(tiny_model_dir, tmp_path / "damaged")
    tensors = load_file(path / "model.safetensors")
    for layer in (0, 1):
        del tensors[f"model.layers.{layer}.mlp.down_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


LOADERS = {"plain": load_model, "quantized": lambda path: load_precision(path, "int8")}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_merged_checkpoint_is_not_taken_for_a_dense_one(load, merged):
    with pytest.raises(SponError, match=r"merged with a SPON adapter.*Start from the base model"):
        load(str(merged))


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_missing_tensors_are_named(load, damaged):
    names = re.escape("model.layers.0.mlp.down_proj.weight, model.layers.1.mlp.down_proj.weight")
    with pytest.raises(SponError, match=f"without {names} it would run on random numbers"):
        load(str(damaged))


def test_a_tied_head_is_not_missing(tmp_path):
    make_tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(
        load_model(str(tmp_path)).lm_head.weight, make_tiny_llama(tie_word_embeddings=True).lm_head.weight
    )


def test_lm_eval_takes_no_merged_model_as_a_base(merged, tmp_path):
    sparse().save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(merged)
    with pytest.raises(SponError, match="Start from the base model, not from a merged one"):
        with_adapter(model, SponArguments.of(str(tmp_path / "adapter")))


def test_a_merged_model_has_no_sites():
    with pytest.raises(SponError, match="2 sparse layers such as model.layers.0.mlp.down_proj"):
        find_sites(sparse(target_modules=["down_proj"]).merge_and_unload())


COMMANDS = ["calibrate", "train", "eval", "compare", "frontier", "ablate", "analyze"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("model", ["merged", "damaged"])
def test_every_command_refuses_it(command, model, request, tmp_path):
    path = request.getfixturevalue(model)
    arguments = ["-o", tmp_path / "out"]
    if command in ("eval", "analyze"):
        sparse().save_pretrained(tmp_path / "adapter")
        arguments = ["--adapter", tmp_path / "adapter"]
    if command == "frontier":
        arguments += ["--formats", "bf16"]
    (tmp_path / "text.txt").write_text("Some text that is long enough. " * 400)
    code, out, err = run(command, path, "--text", tmp_path / "text.txt", *arguments)
    words = {"merged": "merged with a SPON adapter", "damaged": "it would run on random numbers"}[model]
    assert (code, out) == (2, "")
    assert words in " ".join(err.split())
    assert not (tmp_path / "out").exists()
