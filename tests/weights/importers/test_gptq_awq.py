# SPDX-License-Identifier: Apache-2.0
"""GPTQ and AWQ: against their formats' definition, against vLLM's packers and against gptqmodel, where installed."""

import pytest
import torch
from packed_words import AWQ_ORDER, pack
from torch import nn

from spon_plugin import fold_alpha
from spon_plugin.weights import Opaque, is_linear, linear_features, weight_of
from spon_plugin.weights.importers.awq import awq_weight
from spon_plugin.weights.importers.gptq import gptq_weight

IN, OUT, GROUP = 256, 96, 64


class Quantized:
    """Codes, zero points and scales, and the weight that they stand for in the dtype of the scales."""

    def __init__(self, bits, dtype=torch.float16, symmetric=False, act_order=False):
        torch.manual_seed(0)
        self.bits, groups = bits, IN // GROUP
        self.codes = torch.randint(0, 2**bits, (IN, OUT))
        middle = torch.full((groups, OUT), 2 ** (bits - 1))
        self.zeros = middle if symmetric else torch.randint(0, 2**bits, (groups, OUT))
        self.scales = (torch.rand(groups, OUT) * 0.1 + 0.01).to(dtype)
        self.g_idx = torch.arange(IN) // GROUP
        if act_order:
            self.g_idx = self.g_idx[torch.randperm(IN)]
        self.weight = self.scales[self.g_idx] * (self.codes - self.zeros[self.g_idx]).to(dtype)

    def gptq(self, less_one=True):
        zeros = (self.zeros - int(less_one)) & (2**self.bits - 1)
        packed = pack(self.codes.t(), self.bits).t().contiguous(), pack(zeros, self.bits)
        return *packed, self.scales, self.g_idx.to(torch.int32)

    def awq(self):
        return pack(self.codes, 4, AWQ_ORDER), pack(self.zeros, 4, AWQ_ORDER), self.scales


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act_order", [False, True], ids=["runs", "act-order"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("less_one", [True, False], ids=["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(bits, less_one, symmetric, act_order, dtype):
    q = Quantized(bits, dtype, symmetric, act_order)
    weight = gptq_weight(*q.gptq(less_one), bits, less_one)
    assert weight.format == {4: "int4", 8: "int8"}[bits] and weight.row_bytes == OUT * bits // 8
    assert (weight.zeros is None) == symmetric and (weight.group_of_row is None) == (not act_order)
    assert torch.equal(weight.dense(dtype), q.weight)
    index = torch.tensor([3, 200, 77])
    assert torch.equal(weight.rows(index), weight.dense()[index])
    assert torch.equal(weight.shard(32, 64).dense(), weight.dense()[:, 32:64])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_awq(dtype):
    q = Quantized(4, dtype)
    weight = awq_weight(*q.awq())
    assert weight.format == "int4" and weight.group_size == GROUP
    assert torch.equal(weight.dense(dtype), q.weight)


def module(**tensors):
    """What GPTQ's and AWQ's modules have in common."""
    found = nn.Module()
    found.in_features, found.out_features, found.group_size = IN, OUT, GROUP
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            found.register_buffer(name, value)
        else:
            setattr(found, name, value)
    return found


@pytest.mark.parametrize("source", ["gptq", "awq"])
def test_modules_are_linears_that_fold(source):
    q, alpha = Quantized(4), torch.randn(IN)
    names = ("qweight", "qzeros", "scales", "g_idx")
    layer = module(**dict(zip(names, q.gptq() if source == "gptq" else q.awq(), strict=False)), bits=4)
    assert is_linear(layer) and linear_features(layer) == (IN, OUT)
    expected = weight_of(layer).dense().double().t() @ alpha.double()
    torch.testing.assert_close(fold_alpha(layer, alpha).double(), expected, rtol=1e-5, atol=1e-5)


def test_three_bits_are_opaque():
    layer = module(qweight=torch.zeros(IN * 3 // 32, OUT, dtype=torch.int32), qzeros=torch.zeros(4, 9).int(),
                   scales=torch.ones(4, OUT), g_idx=torch.zeros(IN).int(), bits=3)  # fmt: skip
    weight = weight_of(layer)
    assert isinstance(weight, Opaque) and weight.reason.startswith("GPTQ codes of 3 bits")


def test_vllm_packs_alike():
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.quant_utils")
    q = Quantized(4)
    assert torch.equal(utils.gptq_pack(q.codes, 4, IN, OUT), q.gptq()[0])
    assert torch.equal(utils.awq_pack(q.codes, 4, IN, OUT), q.awq()[0])


def a_linear(q):
    linear = nn.Linear(IN, OUT, bias=False)
    linear.weight.data = q.weight.float().t().contiguous()
    return linear


@pytest.mark.parametrize("act_order", [False, True], ids=["runs", "act-order"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptqmodel_gptq(bits, act_order, monkeypatch):
    monkeypatch.setenv("GPTQMODEL_DISABLE_PACK_EXT", "1")  # it would compile C++
    torch_linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    q = Quantized(bits, act_order=act_order)
    layer = torch_linear.TorchLinear(
        bits=bits, group_size=GROUP, sym=False, desc_act=act_order, in_features=IN, out_features=OUT
    )
    layer.pack(a_linear(q), q.scales.t().float(), q.zeros.t().float(), q.g_idx)
    layer.post_init()
    layer.qzero_format(format=2)  # what loading a checkpoint leaves behind
    assert torch.equal(weight_of(layer).dense(torch.float16), layer.dequantize_weight())


def test_gptqmodel_awq():
    torch_awq = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq")
    q = Quantized(4)
    layer = torch_awq.AwqTorchLinear(
        bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=IN, out_features=OUT
    )
    layer.pack(a_linear(q), q.scales.t().float(), q.zeros.t().float())
    host = layer._dequantize_weight_for_inference(torch.zeros(1, IN), dtype=torch.float16)
    assert torch.equal(weight_of(layer).dense(torch.float16), host)
