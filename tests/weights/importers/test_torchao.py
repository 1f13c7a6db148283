# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from spon_plugin import fold_alpha
from spon_plugin.weights import weight_of

torchao = pytest.importorskip("torchao.quantization")


def configs():
    intx, group = torchao.IntxWeightOnlyConfig, torchao.PerGroup
    return {
        "int8": (torchao.Int8WeightOnlyConfig(), "int8"),
        "int8 groups of 32": (torchao.Int8WeightOnlyConfig(granularity=group(32)), "int8"),
        "intx8": (intx(weight_dtype=torch.int8), "int8"),
        "intx4 groups of 32": (intx(weight_dtype=torch.int4, granularity=group(32)), "int8"),
        "intx4 asymmetric": (
            intx(weight_dtype=torch.int4, granularity=group(32), mapping_type=torchao.MappingType.ASYMMETRIC),
            "int8",
        ),
        "float8": (torchao.Float8WeightOnlyConfig(), "fp8"),
        "int8 activations": (torchao.Int8DynamicActivationInt8WeightConfig(), "int8"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", configs())
def test_dense_is_what_torchao_dequantizes(name, dtype):
    torch.manual_seed(0)
    config, format = configs()[name]
    model, alpha = nn.Sequential(nn.Linear(128, 64, dtype=dtype)), torch.randn(128)
    torchao.quantize_(model, config)
    weight = weight_of(model[0])
    assert weight.format == format
    assert torch.equal(weight.dense(dtype), model[0].weight.dequantize().t())
    expected = weight.dense().double().t() @ alpha.double()
    torch.testing.assert_close(fold_alpha(model[0], alpha).double(), expected, rtol=1e-5, atol=1e-5)
