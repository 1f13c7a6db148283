# SPDX-License-Identifier: Apache-2.0
"""Every figure against its formula written out, and what is called a difference."""

import json
import math

import numpy as np
import pytest
import torch

from spon_plugin import SponError
from spon_plugin.studies import quality
from spon_plugin.studies.evaluation import evaluate, evaluate_variants, perplexity
from spon_plugin.studies.quality import Change, Reference, changes, percentile, score
from spon_plugin.studies.quality_tables import UNCERTAIN, change_cells, flat_record, quality_cells

WINDOWS = torch.randint(0, 256, (9, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def other(tiny_llama):
    """The model with other weights in one layer."""
    import copy

    changed = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight.mul_(3.0)
    return changed


@torch.no_grad()
def by_formula(model, reference, first):
    """llama.cpp's figures of every token, in float64 numpy, one token at a time."""
    q = torch.softmax(model(input_ids=WINDOWS).logits.double(), -1).numpy()
    p = torch.softmax(reference(input_ids=WINDOWS).logits.double(), -1).numpy()
    found = {"nll": [], "kl": [], "same_top": [], "dp": []}
    for window in range(len(WINDOWS)):
        for place in range(first, WINDOWS.shape[1] - 1):
            ours, theirs, token = q[window, place], p[window, place], int(WINDOWS[window, place + 1])
            found["nll"].append(-math.log(ours[token]))
            found["kl"].append(sum(a * math.log(a / b) for a, b in zip(theirs, ours, strict=True)))
            found["same_top"].append(float(ours.argmax() == theirs.argmax()))
            found["dp"].append(ours[token] - theirs[token])
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("chunk", [1 << 24, 256 * 3], ids=["whole", "chunks-of-3"])
def test_figures_are_those_of_the_formulas(tiny_llama, other, monkeypatch, first, chunk):
    monkeypatch.setattr(quality, "_CHUNK_FLOATS", chunk)
    wanted = by_formula(other, tiny_llama, first)
    reference = Reference(tiny_llama, WINDOWS)
    found = score(other, WINDOWS, first, batch_size=4, reference=reference).quality()
    assert found.perplexity == pytest.approx(np.exp(wanted["nll"].mean()), rel=1e-5)
    assert found.kl == pytest.approx(wanted["kl"].mean(), rel=1e-4) and found.kl > 0.01
    assert found.kl_99 == pytest.approx(np.quantile(wanted["kl"], 0.99), rel=1e-4)
    assert found.same_top == pytest.approx(wanted["same_top"].mean(), abs=1e-9) and 0.1 < found.same_top < 1
    assert found.rms_dp == pytest.approx(np.sqrt((wanted["dp"] ** 2).mean()), rel=1e-4)
    per_window = wanted["kl"].reshape(len(WINDOWS), -1).mean(1)
    assert found.windows["kl"] == pytest.approx(per_window.tolist(), rel=1e-4)
    for name, (low, high) in found.intervals.items():
        assert low <= getattr(found, name) <= high
    assert set(found.intervals) == {"perplexity", "kl", "kl_99", "same_top", "rms_dp"}


def test_a_model_beside_itself_differs_in_nothing(tiny_llama):
    found = score(tiny_llama, WINDOWS, reference=Reference(tiny_llama, WINDOWS)).quality()
    assert found.same_top == 1 and abs(found.kl) < 1e-6 and found.rms_dp < 1e-6
    assert found.perplexity == perplexity(tiny_llama, WINDOWS)


def test_logits_of_a_batch_are_all_that_is_held(tiny_llama, monkeypatch):
    """Of the reference no more than a chunk is asked for at a time."""
    asked = []
    real = Reference.logits
    monkeypatch.setattr(quality, "_CHUNK_FLOATS", 256 * 4)
    monkeypatch.setattr(Reference, "logits", lambda self, row, part: asked.append(part) or real(self, row, part))
    score(tiny_llama, WINDOWS, reference=Reference(tiny_llama, WINDOWS))
    assert len(asked) == 3 * len(WINDOWS) and max(part.stop - part.start for part in asked) == 4


def test_without_a_reference_there_is_perplexity_alone(tiny_llama):
    figures = evaluate(tiny_llama, None, WINDOWS).figures()
    assert set(figures) == {"tokens", "window", "perplexity", "intervals", "windows"}
    assert set(figures["windows"]) == {"nll"} == set(evaluate(tiny_llama, None, WINDOWS).quality.windows)
    assert json.loads(json.dumps(figures)) is not None


def test_another_vocabulary_is_refused(tiny_llama):
    reference = Reference(tiny_llama, WINDOWS)
    reference.head = lambda states: torch.zeros(len(states), 7)
    reference.head.device = torch.device("cpu")
    with pytest.raises(SponError, match="reference: got 'a vocabulary of 7', expected one of 256"):
        score(tiny_llama, WINDOWS, reference=reference)


def test_a_percentile_lies_on_a_line_between_two_values():
    values = torch.tensor([4.0, 1.0, 2.0, 8.0])
    assert percentile(values, 0.5) == 3.0 and percentile(values, 1.0) == 8.0
    assert percentile(values, 0.99) == pytest.approx(np.quantile(values.numpy(), 0.99))


def test_differences_are_paired():
    """Windows differ a hundred times as much as the models do, and yet the difference is certain."""
    hard = np.linspace(1, 5, 20)
    noise = 0.01 * np.cos(np.arange(20))
    before = {"nll": hard.tolist(), "kl": hard.tolist(), "squared_dp": hard.tolist()}
    after = {"nll": (hard - 0.03 + noise).tolist(), "kl": (hard + noise).tolist()}
    found = changes(before, after)
    assert set(found) == {"perplexity", "kl"}
    assert found["perplexity"].certain and found["perplexity"].value == pytest.approx(np.exp(-0.03 + noise.mean()) - 1)
    assert found["perplexity"].ends[0] < found["perplexity"].value < found["perplexity"].ends[1] < 0
    assert not found["kl"].certain
    assert changes(before, after) == found  # seeded
    few = {name: values[:7] for name, values in before.items()}, {name: values[:7] for name, values in after.items()}
    assert changes(*few)["perplexity"].ends is None and not changes(*few)["perplexity"].certain


def test_a_window_without_a_figure_gives_no_difference():
    assert changes({"nll": [1.0, None]}, {"nll": [1.0, 2.0]}) == {} == changes({}, {"nll": [1.0]})


def test_no_difference_is_called_one_inside_its_interval():
    found = {
        "perplexity": Change(-0.02, (-0.05, 0.01)),
        "kl": Change(-0.2, (-0.3, -0.1)),
        "same_top": Change(0.1, None),
    }
    names = ("perplexity", "kl", "same_top", "rms_dp")
    assert change_cells(found, names) == [UNCERTAIN, "-0.2 [-0.3, -0.1]", UNCERTAIN, ""]
    result = {"kl": 0.1234, "same_top": 0.9, "intervals": {"kl": (0.1, 0.2)}}
    assert quality_cells(result) == ["0.123 [0.1, 0.2]", "", "90.0%", ""]
    assert flat_record(result)["kl_low"] == 0.1 and flat_record(result)["rms_dp_high"] is None


def test_an_adapter_is_compared_with_the_dense_model_or_another(tiny_llama, other):
    from spon_plugin import find_sites
    from spon_plugin.sparsifiers.calibrate import calibrate

    adapter = calibrate(tiny_llama, find_sites(tiny_llama), WINDOWS, WINDOWS, 0.5, alpha="mean")
    seen = []
    result = evaluate_variants(tiny_llama, adapter, WINDOWS, progress=lambda *step: seen.append(step))
    assert seen == sorted(seen) and seen[-1] == (4 * len(WINDOWS), 4 * len(WINDOWS))
    assert result.quality["dense"].kl == pytest.approx(0, abs=1e-6) and result.quality["teal"].kl > 1e-3
    assert result.perplexity == {name: found.perplexity for name, found in result.quality.items()}
    change = result.changes()["perplexity"].value
    assert change == pytest.approx(result.perplexity["spon"] / result.perplexity["teal"] - 1, rel=1e-6)
    far = evaluate_variants(tiny_llama, adapter, WINDOWS, reference=Reference(other, WINDOWS))
    assert far.quality["dense"].kl > 0.01 and far.perplexity == result.perplexity
