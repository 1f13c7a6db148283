# SPDX-License-Identifier: Apache-2.0
"""Error feedback against its formulas: the ridge by least squares, the rounding by eliminating one input at a time."""

import pytest
import torch

from spon_plugin.weights.error_feedback import DAMPING, LONGEST, Moments, fitted, rounded

LOW, HIGH = -8.0, 7.0


def data(outputs=6, inputs=24, tokens=400):
    """A weight, correlated inputs of a sparse model, and those of the dense one."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(inputs, inputs, generator=generator)
    exact = torch.randn(tokens, inputs, generator=generator) @ mixed
    reads = torch.where(exact.abs() > exact.abs().median(), exact, 0)
    return torch.randn(outputs, inputs, generator=generator), reads, exact


def moments(reads, exact):
    found = Moments(reads.shape[1], reads.device)
    for part, other in zip(reads.split(150), exact.split(150), strict=True):
        found.add(part, other)
    return found


def scales(columns):
    """By the largest weight; symmetric."""
    scale = columns.abs().amax(1, keepdim=True) / HIGH
    return scale, torch.zeros_like(scale)


@pytest.mark.parametrize("ridge", [0.01, 1.0, 100.0])
def test_fitted_is_the_ridge_regression_that_is_held_to_the_weight(ridge):
    weight, reads, exact = data()
    known = moments(reads, exact)
    root = (ridge * known.typical) ** 0.5 * torch.eye(24)
    inputs, outputs = torch.cat([reads, root]), torch.cat([exact @ weight.t(), root @ weight.t()])
    expected = torch.linalg.lstsq(inputs.double(), outputs.double()).solution.t().float()
    torch.testing.assert_close(fitted(weight, known, ridge), expected, rtol=1e-3, atol=1e-3)


def test_where_nothing_is_read_the_weight_stays():
    weight, reads, exact = data()
    nothing = moments(torch.zeros_like(reads), exact)
    assert torch.equal(fitted(weight, nothing), weight)
    values, scale, _ = rounded(weight, nothing, None, scales, LOW, HIGH)
    torch.testing.assert_close(values, (weight / scale).round() * scale)


@pytest.mark.parametrize("group", [8, 24, None], ids=["groups", "one group", "none"])
def test_rounded_is_the_elimination_of_one_input_after_the_other(group):
    weight, reads, exact = data()
    known = moments(reads, exact)
    values, scale, zero = rounded(weight, known, group, scales, LOW, HIGH)
    assert scale.shape == zero.shape == (6, 24 // (group or 24))
    left = weight.double().clone()
    inverse = (known.reads + DAMPING * known.typical * torch.eye(24)).double().inverse()
    for at in range(24):
        if at % (group or 24) == 0:
            step = scales(left[:, at : at + (group or 24)])[0][:, 0]
        value = (left[:, at] / step).round().clamp(LOW, HIGH) * step
        torch.testing.assert_close(values[:, at].double(), value, rtol=1e-4, atol=1e-4)
        error = (left[:, at] - value) / inverse[at, at]
        left -= torch.outer(error, inverse[at])
        inverse = inverse - torch.outer(inverse[:, at], inverse[at]) / inverse[at, at]


def test_the_outputs_are_nearer_than_those_of_the_nearest_values():
    weight, reads, exact = data()
    known = moments(reads, exact)
    values, scale, _ = rounded(weight, known, None, scales, LOW, HIGH)
    nearest = (weight / scale).round().clamp(LOW, HIGH) * scale

    def off(other):
        return (reads @ (other - weight).t()).square().sum()

    assert off(values) < 0.75 * off(nearest)


def test_a_token_that_is_far_longer_than_others_counts_as_one_that_is_ten_times_as_long():
    _, reads, exact = data()
    length = reads.norm(dim=1).median()
    sink, same = reads.clone(), reads.clone()
    sink[0] *= 1e4 / sink[0].norm()
    same[0] *= LONGEST * length / same[0].norm()
    ours, expected = Moments(24, reads.device), Moments(24, reads.device)
    ours.add(sink, exact)
    expected.add(same, exact)
    torch.testing.assert_close(ours.reads, expected.reads, rtol=0.02, atol=1.0)
    assert ours.exact[0].norm() < moments(sink, exact).exact[0].norm() * 1.001
