# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from spon_plugin import fold_alpha
from spon_plugin.weights import weight_of

ct = pytest.importorskip("compressed_tensors.quantization")
qparams = pytest.importorskip("compressed_tensors.quantization.utils").calculate_qparams
compressors = pytest.importorskip("compressed_tensors.compressors")

FORMATS = {4: "int4", 8: "int8"}


def quantized(bits, group, symmetric, dtype, shape=(80, 256)):
    """A linear that the library itself has quantized by rounding and, after `compress_module`, packed."""
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    strategy = "channel" if group is None else "group"
    weights = ct.QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group)
    scheme = ct.QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    ct.initialize_module_for_quantization(layer, scheme)
    groups = layer.weight.unflatten(1, (-1, group or shape[1]))
    scale, zero = qparams(groups.amin(-1), groups.amax(-1), weights)
    layer.weight_scale.data.copy_(scale)
    if not symmetric:
        layer.weight_zero_point.data.copy_(zero)
    layer.quantization_status = ct.QuantizationStatus.FROZEN
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_dense_is_what_the_library_decompresses(bits, group, symmetric, dtype):
    layer = quantized(bits, group, symmetric, dtype)
    compressors.compress_module(layer)
    weight = weight_of(layer)
    assert weight.format == FORMATS[bits] and weight.scales.shape[0] == 256 // (group or 256)
    assert weight.row_bytes == 80 * bits // 8
    compressors.decompress_module(layer)
    assert torch.equal(weight.dense(dtype), layer.weight.t())


def test_outputs_that_fill_no_byte_or_word():
    layer = quantized(4, 32, False, torch.float32, shape=(77, 96))
    compressors.compress_module(layer)
    weight = weight_of(layer)
    assert weight.out_features == 77 and weight.row_bytes == 39
    compressors.decompress_module(layer)
    assert torch.equal(weight.dense(), layer.weight.t())


def test_act_order():
    layer = quantized(4, 64, True, torch.float32)
    compressors.compress_module(layer)
    order = torch.randperm(256)
    layer.weight_g_idx = nn.Parameter((torch.arange(256) // 64)[order].to(torch.int32), requires_grad=False)
    weight = weight_of(layer)
    groups = layer.weight_g_idx.long()
    codes = compressors.unpack_from_int32(layer.weight_packed, 4, torch.Size((80, 256)))
    assert torch.equal(weight.dense(), (codes.float() * layer.weight_scale[:, groups]).t())


@pytest.mark.parametrize("compressed", [True, False], ids=["packed", "rounded in every pass"])
def test_the_fold_is_that_of_the_rounded_weight(compressed):
    layer, alpha = quantized(4, 64, False, torch.float32), torch.randn(256)
    with torch.no_grad():
        expected = layer(alpha[None])[0]  # rounds the weight on the fly
    if compressed:
        compressors.compress_module(layer)
    torch.testing.assert_close(fold_alpha(layer, alpha), expected, rtol=1e-4, atol=1e-5)
