# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from spon_cli.commands import quickstart
from spon_cli.duration import in_words, likely_minutes
from spon_plugin import machine
from spon_plugin.training.recipe import preset


@pytest.mark.parametrize(("native", "computes"), [(True, "bfloat16"), (False, "float32")], ids=["native", "emulated"])
def test_it_says_what_it_found_and_how_long_it_takes_there(monkeypatch, native, computes):
    asked = []
    dtypes = frozenset([torch.bfloat16] if native else [])
    monkeypatch.setattr(machine, "native_dtypes", lambda: dtypes)
    monkeypatch.setattr(machine, "operations_per_second", lambda dtype, _: asked.append(dtype) or 1e11)
    monkeypatch.setattr(quickstart, "best_device", lambda: "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    said = quickstart._announcement(preset("fast").with_changes(windows=80))
    kind = "native" if native else "emulated"
    # 102,400 passes of tokens through 135 million parameters, and half as much beside the products.
    assert said == f"CPU, 2 threads, bfloat16 {kind}: computing in {computes}, about 7 minutes for 80 windows."
    assert asked == [getattr(torch, computes)]


def test_the_products_of_the_machine_are_timed():
    rate = machine.operations_per_second(torch.float32)
    assert 1e7 < rate < 1e16
    assert likely_minutes(10**6, 3000, torch.float32, "cpu") < 1000


@pytest.mark.parametrize(("minutes", "words"), [(0.2, "about a minute"), (1.6, "about 2 minutes")])
def test_minutes_in_words(minutes, words):
    assert in_words(minutes) == words
