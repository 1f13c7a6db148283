# SPDX-License-Identifier: Apache-2.0
"""The operator `spon_vllm::linear` by itself."""

import pytest
import torch

pytest.importorskip("vllm.logger", reason="needs vllm")  # this folder alone would pass for `vllm`

import spon_vllm.ops  # noqa: F401 (registers the operator)
from spon_plugin import machine
from spon_plugin.kernels import gemm


@pytest.mark.parametrize("limit", [4, -1], ids=["dense", "sparse"])
@pytest.mark.parametrize("native", [False, True], ids=["emulated", "native"])
def test_steps_of_many_rows_go_by_panels_where_bfloat16_is_emulated(monkeypatch, native, limit):
    dtypes = frozenset([torch.bfloat16] if native else [])
    monkeypatch.setattr(machine, "native_dtypes", lambda: dtypes)
    rows, by_panels = [], gemm._by_panels
    monkeypatch.setattr(gemm.panels, "why_not", lambda x, weight: "not here")
    monkeypatch.setattr(gemm, "_by_panels", lambda x, *rest: (rows.append(len(x)), by_panels(x, *rest))[1])
    torch.manual_seed(0)
    x, weight = torch.randn(16, 64).bfloat16(), torch.randn(64, 48).bfloat16().t()
    threshold, bias = torch.tensor([0.5]), torch.randn(48).bfloat16()
    y = torch.ops.spon_vllm.linear(x, weight, threshold, bias.float(), bias, None, limit)
    assert rows == ([] if native else [16])
    kept = x.double() * (x.abs() > threshold) if limit < 0 else x.double()
    torch.testing.assert_close(y.double(), kept @ weight.double().t() + bias.double(), rtol=2e-2, atol=2e-1)
