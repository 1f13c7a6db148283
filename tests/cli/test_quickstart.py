# SPDX-License-Identifier: Apache-2.0
import shlex
from pathlib import Path

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
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    said = quickstart._announcement(preset("fast").with_changes(windows=80))
    kind = "native" if native else "emulated"
    # 102,400 passes of tokens through 135 million parameters, and half as much beside the products.
    plan = "This calibrates on 16384 tokens, trains 40 steps of 2 x 256 tokens, evaluates on 8192"
    assert said == (
        f"CPU, 2 cores, 2 threads, bfloat16 {kind}, no GPU. {plan}, computing in {computes}: about 7 minutes."
    )
    assert asked == [getattr(torch, computes)]


def test_the_products_of_the_machine_are_timed():
    rate = machine.operations_per_second(torch.float32)
    assert 1e7 < rate < 1e16
    assert likely_minutes(10**6, 3000, torch.float32, "cpu") < 1000


@pytest.mark.parametrize(("minutes", "words"), [(0.2, "about a minute"), (1.6, "about 2 minutes")])
def test_minutes_in_words(minutes, words):
    assert in_words(minutes) == words


@pytest.mark.parametrize(
    ("installed", "first"),
    [
        ((), ["spon eval", "spon merge", "spon inspect"]),
        (("lm_eval",), ["lm_eval --model", "spon eval", "spon merge"]),
        (("vllm", "lm_eval"), ["vllm serve", "lm_eval --model", "spon eval"]),
    ],
    ids=["alone", "lm-eval", "both"],
)
def test_three_commands_end_it_those_of_installed_hosts_first(monkeypatch, installed, first):
    monkeypatch.setattr(quickstart.shutil, "which", lambda name: name if name in installed else None)
    lines = quickstart._next(Path("my work"))
    assert [" ".join(line.split()[:2]) for line in lines] == first
    for line in lines:  # one argument each, whatever is in the name
        assert any("my work/adapter" in part for part in shlex.split(line))
