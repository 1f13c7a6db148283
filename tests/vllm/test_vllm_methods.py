# SPDX-License-Identifier: Apache-2.0
"""Adapters that `calibrate` makes by several methods, one of another package among them, in an engine and in PEFT."""

import sys

import pytest
import torch
from engines import PROMPTS, engine, forced, generate, make_model, override, peft_model
from strangers import NAME, install

from spon_plugin import find_sites, write_adapter
from spon_plugin.sparsifiers.calibrate import calibrate


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wina", "scap", NAME])
def test_masks_of_every_method_are_served(method, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path / "site"))
    model = make_model(tmp_path / "base")
    windows = torch.tensor(PROMPTS)
    try:
        adapter = calibrate(
            model, find_sites(model), windows, windows, 0.5, method,
            alpha="mean", dense_prefix=0, base_model=str(tmp_path / "base"),
        )  # fmt: skip
    finally:
        sys.modules.pop("a_stranger", None)
    write_adapter(adapter, tmp_path / "adapter")
    with engine(tmp_path / "base", **override(tmp_path / "adapter", token_mode="all")) as llm:
        tokens, logprobs = generate(llm, count=16)
    assert (logprobs - forced(peft_model(tmp_path / "base", tmp_path / "adapter"), tokens)).abs().mean() <= 0.001
    assert (logprobs - forced(model, tokens)).abs().mean() > 0.05
