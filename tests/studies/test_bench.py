# SPDX-License-Identifier: Apache-2.0
"""What rows share: a text is read once for each method, dense states are made once."""

import pytest
import torch

from spon_plugin import SponError, find_sites
from spon_plugin.sparsifiers import Sparsifier, cats
from spon_plugin.studies.bench import Bench

WINDOWS = torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bench(tiny_llama):
    return Bench(model=tiny_llama, sites=find_sites(tiny_llama), tests={"a": WINDOWS[4:]})


@pytest.fixture
def read(monkeypatch):
    """The names of the methods that read a text, in order."""
    names, original = [], Sparsifier.calibrate
    monkeypatch.setattr(
        Sparsifier, "calibrate", lambda self, *a, **k: names.append(self.name) or original(self, *a, **k)
    )
    return names


def test_a_text_is_read_once_for_each_method(bench, read):
    first, _ = bench.fit("teal", WINDOWS[:4], 0.5)
    assert bench.fit("teal", WINDOWS[:4].clone(), 0.5)[0] is first
    bench.fit("teal", WINDOWS[:4], 0.6)
    bench.fit("teal", WINDOWS[:2], 0.5)
    bench.fit("teal", WINDOWS[:4], 0.7)
    assert read == ["teal", "teal"]
    bench.fit("scap", WINDOWS[:4], 0.5)
    bench.fit("teal", WINDOWS[:4], 0.5)  # what was read for another method is let go
    assert read == ["teal", "teal", "scap", "teal"]


def test_a_method_that_does_not_fit_says_so_again_without_reading(bench, read):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cats, "gated_mlps", lambda *_: (_ for _ in ()).throw(SponError("no gated MLP")))
        for sparsity in (0.1, 0.2):
            with pytest.raises(SponError, match="no gated MLP"):
                bench.fit("cats", WINDOWS[:4], sparsity)
    assert read == ["cats"]


def test_dense_states_are_made_once(bench):
    states = bench.dense_states(WINDOWS[:4])
    assert bench.dense_states(WINDOWS[:4].clone()) is states
    assert bench.dense_states(WINDOWS[:2]) is not states
