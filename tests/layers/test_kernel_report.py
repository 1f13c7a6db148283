# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from spon_plugin import SparseLinear
from spon_plugin.kernels import table
from spon_plugin.layers.kernel_report import kernel_rows
from spon_plugin.layers.sparse_quantized import SparseQuantizedLinear
from spon_plugin.weights.int4 import Int4Weight


class Int8(nn.Module):
    """As importers know it by its structure."""

    def __init__(self, scales=32):
        super().__init__()
        self.in_features, self.out_features = 64, 32
        self.weight = nn.Parameter(torch.ones(32, 64, dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(scales, 1), requires_grad=False)


class Own(nn.Linear):
    """A forward of its own: nobody can read its rows."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_kinds_have_a_row_each_with_the_kernel_that_runs():
    merged = SparseLinear(64, 32)
    merged.spon_threshold.fill_(0.5)
    merged.arrange_for_kernels()
    linears = {
        "a.0.up": nn.Linear(64, 32),
        "a.1.up": nn.Linear(64, 32),
        "a.0.down": Int8(),
        "a.1.down": SparseQuantizedLinear(Int8()),
        "a.1.o": Own(64, 32),
        "a.2.o": merged,
    }
    rows = kernel_rows(linears, torch.float32)
    assert [(row.linears, row.number, row.format) for row in rows] == [
        ("up", 2, "dense"),
        ("down", 1, "int8"),
        ("down", 1, "int8"),
        ("o", 1, "opaque"),
        ("o", 1, "dense"),
    ]
    for row, linear in zip(rows, list(linears.values())[1:], strict=True):
        if row.format != "opaque":
            problem = table.Problem(torch.zeros(1, 64), None if row.format == "dense" else _arranged(linear))
            assert row.kernel == table.described(problem) and row.why_not == table.reasons(problem)
    assert "forward of its own" in rows[3].why_not["all"]


def _arranged(linear):
    from spon_plugin.weights import weight_of

    return weight_of(linear).arranged()


def test_four_bits_say_by_which_instruction_they_are_summed(monkeypatch):
    monkeypatch.setattr(table.scaled, "sums_of", lambda weight: f"{weight.format}-avxvnni")
    four = Int4Weight(torch.zeros(64, 16, dtype=torch.uint8), torch.ones(1, 32), None, 64)
    monkeypatch.setattr(table.scaled, "why_not", lambda weight: "")
    monkeypatch.setattr(table.panels, "why_not", lambda x, weight: "")
    assert table.described(table.Problem(torch.zeros(1, 64), four)) == "cpu scaled (int4-avxvnni)"
    assert table.described(table.Problem(torch.zeros(9, 64), four)) == "decoded (panels)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reason_is_the_tables(dtype):
    (row,) = kernel_rows({"down": Int8()}, dtype)
    if dtype == torch.float64:
        assert row.kernel == "decoded" and "torch.float64" in row.why_not["cpu scaled"]
    assert row.many.split(" (")[0] == "decoded" and row.dtype == str(dtype).removeprefix("torch.")


def test_a_layer_whose_weight_lies_by_outputs_says_so():
    (row,) = kernel_rows({"up": SparseLinear(64, 32)}, torch.float32)
    assert row.kernel == "masked dense product" and "by outputs" in row.why_not["all"]
