# SPDX-License-Identifier: Apache-2.0
"""Whole modules that PEFT saves beside masks are read and written as they are; nothing else is let in."""

from dataclasses import replace

import pytest
import torch

from spon_plugin import Adapter, SponError, SponFields, read_adapter, write_adapter
from spon_plugin.adapter.mask import Mask

PATH = "model.layers.0.mlp.down_proj"
MATRIX = torch.arange(12, dtype=torch.bfloat16).reshape(4, 3)


def adapter(saved, names=None):
    masks = {PATH: Mask(torch.tensor([0.5]), None, torch.ones(3))}
    return Adapter(SponFields(), masks, {"modules_to_save": names}, saved)


FOUND = {
    "the head": ({"lm_head.weight": MATRIX}, ["lm_head"]),
    "the head with its bias": ({"lm_head.weight": MATRIX, "lm_head.bias": torch.ones(4)}, None),
    "norms by the end of their names": ({"model.layers.1.input_layernorm.weight": torch.ones(3)}, ["norm"]),
    "what is inside a module": ({"score.dense.weight": MATRIX, "score.scale": torch.tensor(2.0)}, ["score"]),
    "resized embeddings": ({"model.embed_tokens.weight": MATRIX, "lm_head.weight": MATRIX + 1}, None),
    "GPT-2's embedding": ({"transformer.wte.weight": MATRIX}, None),
    "a targeted head": ({"lm_head.base_layer.weight": MATRIX}, None),
}


@pytest.mark.parametrize("saved, names", FOUND.values(), ids=FOUND)
def test_whole_modules_survive(saved, names, tmp_path):
    written = adapter(saved, names)
    write_adapter(written, tmp_path / "a")
    read = read_adapter(tmp_path / "a")
    assert read.saved.keys() == saved.keys()
    for key, tensor in saved.items():
        assert read.saved[key].dtype == tensor.dtype and torch.equal(read.saved[key], tensor)
    assert set(read.masks) == {PATH} and read.digest == written.digest
    assert read.digest != replace(read, saved={}).digest  # another function
    write_adapter(read, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert read.without_alpha().saved.keys() == saved.keys()


UNKNOWN = {
    "a matrix in a block": {"model.layers.0.mlp.up_proj.weight": MATRIX},
    "a vector": {"model.norm.weight": torch.ones(3)},
    "a bias alone": {"lm_head.bias": torch.ones(3)},
    "another method's": {"lora_A": MATRIX},
    "another kind": {"model.embed_tokens.scale": MATRIX},
}


@pytest.mark.parametrize("saved", UNKNOWN.values(), ids=UNKNOWN)
def test_other_tensors_are_unknown(saved, tmp_path):
    write_adapter(adapter(saved), tmp_path / "a")
    with pytest.raises(SponError, match=f"{next(iter(saved))}: got 'an unknown tensor'"):
        read_adapter(tmp_path / "a")


def test_a_host_of_masks_alone_refuses_them():
    adapter({}).check_masks_alone("a host")
    with pytest.raises(SponError, match=r"modules_to_save: got \['lm_head'\], expected none: a host takes masks"):
        adapter({"lm_head.weight": MATRIX}).check_masks_alone("a host")
