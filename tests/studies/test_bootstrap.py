# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import scipy.stats
import torch

from spon_plugin.studies.bootstrap import FEWEST, _student, excludes_zero, interval, percentile_interval


def first(means):
    return means[0]


@pytest.mark.parametrize("windows", [8, 12, 100])
def test_the_interval_of_a_mean_is_that_of_students_t(windows):
    """For well-behaved values both are the same thing; plain percentiles would be a fifth narrower at 8 windows."""
    values = torch.tensor(scipy.stats.norm.ppf((np.arange(windows) + 0.5) / windows))[None]
    low, high = interval(values, first)
    half = scipy.stats.t.ppf(0.975, windows - 1) * float(values.std()) / math.sqrt(windows)
    assert (low, high) == pytest.approx((-half, half), rel=0.08)


def test_it_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    held = 0
    for _ in range(100):
        low, high = interval(torch.randn(1, 10, generator=generator), first)
        held += low <= 0 <= high
    assert held >= 88


def test_draws_are_seeded_and_shared_by_the_columns():
    values = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    assert interval(values, first, seed=3) == interval(values, first, seed=3) != interval(values, first, seed=4)
    same = torch.stack([values[0], values[0] + 1])
    assert interval(same, lambda means: means[1] - means[0]) == pytest.approx((1, 1))


def test_a_percentile_is_drawn_by_windows(monkeypatch):
    values = torch.randn(40, 25, generator=torch.Generator().manual_seed(0)) + torch.arange(40)[:, None]
    low, high = percentile_interval(values, 0.9)
    rng = np.random.default_rng(0)
    drawn = [np.quantile(values[rng.integers(40, size=40)].numpy(), 0.9) for _ in range(2000)]
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.022, 0.978]).tolist(), abs=1.5)
    monkeypatch.setattr("spon_plugin.studies.bootstrap._CELLS", 5000)  # a few draws at a time are the same draws
    assert percentile_interval(values, 0.9) == (low, high)


@pytest.mark.parametrize(
    "values",
    [torch.zeros(1, FEWEST - 1), torch.tensor([[*range(20), float("nan")]]), torch.tensor([[*range(20), math.inf]])],
    ids=["few", "nan", "infinite"],
)
def test_there_is_no_interval_of_few_windows_or_of_what_is_not_finite(values):
    assert interval(values, first) is None and percentile_interval(values.t(), 0.99) is None
    assert not excludes_zero(None)
    assert interval(torch.rand(1, 20) - 0.5, lambda means: means[0].log()) is None


def test_an_interval_excludes_zero_or_holds_it():
    assert excludes_zero((0.1, 0.2)) and excludes_zero((-0.2, -0.1)) and not excludes_zero((-0.1, 0.1))


@pytest.mark.parametrize("freedom", [7, 11, 100])
def test_students_t(freedom):
    assert _student(1.959964, freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=5e-3)
