# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from spon_plugin import SponError, fold_alpha
from spon_plugin.weights import weight_of
from spon_plugin.weights.importers.gguf import gguf_weight

gguf = pytest.importorskip("gguf")

# Type -> format and inputs of a group.
TYPES = {
    "Q8_0": ("int8", 32),
    "Q4_0": ("int4", 32),
    "Q4_1": ("int4", 32),
    "Q5_0": ("int8", 32),
    "Q5_1": ("int8", 32),
    "Q4_K": ("int4", 32),
    "Q5_K": ("int8", 32),
    "Q6_K": ("int8", 16),
}


def from_a_file(path, data, kind):
    """The weight in a GGUF file that holds `data`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = gguf.GGUFReader(path).tensors
    blocks = torch.from_numpy(tensor.data.copy()).view(torch.uint8)
    return gguf_weight(blocks, tensor.tensor_type, int(tensor.shape[0]), tensor.name)


def blocks_of(kind, rows, in_features):
    """Codes of a type: quantized by the library where it can, else random bytes with scales that are numbers."""
    values = np.random.default_rng(0).standard_normal((rows, in_features)).astype(np.float32)
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        size, nbytes = gguf.GGML_QUANT_SIZES[kind]
        data = np.random.default_rng(1).integers(0, 256, (rows, in_features // size, nbytes), dtype=np.uint8)
        scale = np.random.default_rng(2).uniform(0.01, 0.1, (*data.shape[:2], 2)).astype(np.float16).view(np.uint8)
        if kind.name == "Q6_K":
            data[..., -2:] = scale[..., :2]
        else:
            data[..., :4] = scale
        return data.reshape(rows, -1)


@pytest.mark.parametrize("name", TYPES)
def test_dense_is_what_gguf_dequantizes(name, tmp_path):
    kind = gguf.GGMLQuantizationType[name]
    data = blocks_of(kind, 48, 512)
    weight = from_a_file(tmp_path / "a.gguf", data, kind)
    assert (weight.format, weight.group_size) == TYPES[name]
    assert weight.row_bytes == (48 if weight.format == "int8" else 24)
    assert torch.equal(weight.dense(), torch.from_numpy(gguf.dequantize(data, kind)).t())
    part = weight.shard(16, 32)
    assert torch.equal(part.dense(), weight.dense()[:, 16:32])


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats_stay_as_they_are(name, tmp_path):
    kind = gguf.GGMLQuantizationType[name]
    values = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    data = gguf.quantize(values, kind)
    weight = from_a_file(tmp_path / "a.gguf", data, kind)
    assert weight.format == "dense"
    assert torch.equal(weight.dense(torch.float32), torch.from_numpy(gguf.dequantize(data, kind)).t())


def test_a_type_without_a_counterpart_is_named(tmp_path):
    kind = gguf.GGMLQuantizationType.IQ4_XS
    data = np.zeros((4, 2 * gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    with pytest.raises(SponError, match="weight: type: got 23, expected floats or one of Q4_0"):
        from_a_file(tmp_path / "a.gguf", data, kind)


@pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted inputs"])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K"])
def test_the_linear_of_transformers(name, permuted):
    utils = pytest.importorskip("transformers.integrations.gguf.utils")
    kind = gguf.GGMLQuantizationType[name]
    torch.manual_seed(0)
    layer = utils.GgufLinear(512, 48, int(kind))
    layer.weight.data = torch.from_numpy(blocks_of(kind, 48, 512))
    if permuted:
        layer.input_permutation = torch.randperm(512)
    weight, alpha = weight_of(layer), torch.randn(512)
    with torch.no_grad():
        expected = layer(torch.eye(512))
    torch.testing.assert_close(weight.dense(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(fold_alpha(layer, alpha), alpha @ expected, rtol=1e-4, atol=1e-4)
