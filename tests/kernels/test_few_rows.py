# SPDX-License-Identifier: Apache-2.0
"""The rule for few rows, by the numbers that hosts rely on."""

import pytest

from spon_plugin.kernels.few_rows import CPU_ROWS, GPU_ROWS, row_limit

SPARSITIES = [0.5, 0.6, 0.7, 0.8]


@pytest.mark.parametrize(("device", "limits"), [("cuda", [1, 2, 3, 5]), ("cpu", [2, 2, 3, 6])], ids=["cuda", "cpu"])
def test_limit_falls_with_the_share_that_all_rows_skip(device, limits):
    assert [row_limit(sparsity, device) for sparsity in SPARSITIES] == limits


def test_an_unknown_device_counts_as_a_gpu():
    assert [row_limit(sparsity, "xpu") for sparsity in SPARSITIES] == [1, 2, 3, 5]


@pytest.mark.parametrize(("device", "most"), [("cuda", GPU_ROWS), ("cpu", CPU_ROWS)], ids=["cuda", "cpu"])
def test_one_row_at_least_and_no_more_than_the_kernels_take(device, most):
    assert row_limit(0.0, device) == row_limit(0.1, device) == 1
    assert row_limit(0.999, device) == most
