# SPDX-License-Identifier: Apache-2.0
"""Tiny quantized checkpoints in the formats of their hosts, and what their weights mean."""

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from packed_words import AWQ_ORDER, pack
from safetensors.torch import load_file, save_file

from spon_plugin import find_sites

GROUP = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
W8A8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"], "weights": GROUP,
            "input_activations": {**GROUP, "strategy": "token", "dynamic": True},
        },
    },
}  # fmt: skip
"""Weights in 8 bits by output, inputs in 8 bits by token."""


def int8(weight):
    """Codes and scales ``[out, 1]`` of a weight ``[out, in]``.

    They are within 7 bits: without VNNI, vLLM's CPU kernel adds pairs of products in 16 bits, which saturate beyond.
    """
    scales = weight.abs().amax(1, keepdim=True) / 63
    return (weight / scales).round().to(torch.int8), scales


class Format(NamedTuple):
    """A format of quantized weights.

    Attributes:
        method: its name in vLLM.
        config: `quantization_config` as a checkpoint has it.
        one: from a generator, a linear's shape ``(out, in)`` and the dtype of scales to the linear's tensors and the
            weight that they mean.
    """

    method: str
    given: dict
    one: Callable

    def config(self):
        """vLLM's own configuration object."""
        from vllm.model_executor.layers.quantization import get_quantization_config

        return get_quantization_config(self.method).from_config({"quant_method": self.method, **self.given})

    def tensors(self, seed, sizes, in_features, dtype):
        """Random tensors of linears that are fused, by name, and the weights that they mean."""
        generator = torch.Generator().manual_seed(seed)
        parts = [self.one(generator, size, in_features, dtype) for size in sizes]
        return {name: [part[0][name] for part in parts] for name in parts[0][0]}, [part[1] for part in parts]


GROUP_SIZE = 32


def _codes(generator, bits, rows, columns, group=GROUP_SIZE, dtype=torch.float32, symmetric=False):
    """Unsigned codes ``[in, out]``, zero points and scales ``[groups, out]``, and what they mean, ``[out, in]``."""
    codes = torch.randint(0, 2**bits, (columns, rows), generator=generator)
    zeros = torch.randint(0, 2**bits, (columns // group, rows), generator=generator)
    zeros = torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
    scales = (0.01 + 0.1 * torch.rand(columns // group, rows, generator=generator)).to(dtype) / 2 ** (bits - 4)
    meant = (codes - zeros.repeat_interleave(group, 0)) * scales.float().repeat_interleave(group, 0)
    return codes, zeros, scales, meant.t()


def _awq(generator, rows, columns, dtype):
    from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack

    codes, zeros, scales, meant = _codes(generator, 4, rows, columns, dtype=dtype)
    qzeros = awq_pack(zeros, 4, *zeros.shape)
    return {"qweight": awq_pack(codes, 4, columns, rows), "qzeros": qzeros, "scales": scales}, meant


def _gptq(generator, rows, columns, dtype):
    from vllm.model_executor.layers.quantization.utils.quant_utils import gptq_pack, pack_cols

    codes, zeros, scales, meant = _codes(generator, 4, rows, columns, dtype=dtype, symmetric=True)
    qzeros = pack_cols(zeros - 1, 4, *zeros.shape)
    return {"qweight": gptq_pack(codes, 4, columns, rows), "qzeros": qzeros, "scales": scales}, meant


def _packed(bits, group, symmetric):
    """compressed-tensors' pack-quantized integers, by its own packer."""

    def one(generator, rows, columns, dtype):
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        size = group or columns
        codes, zeros, scales, meant = _codes(generator, bits, rows, columns, size, dtype, symmetric)
        middle = 2 ** (bits - 1)
        packed = pack_to_int32((codes - middle).to(torch.int8).t().contiguous(), bits)
        tensors = {"weight_packed": packed, "weight_scale": scales.t().contiguous()}
        if not symmetric:
            signed = (zeros - middle).to(torch.int8).t().contiguous()
            tensors["weight_zero_point"] = pack_to_int32(signed, bits, packed_dim=0)
        return tensors, meant

    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **strategy}
    return Format("compressed-tensors", _scheme("pack-quantized", weights), one)


def _float8(generator, rows, columns, shape):
    codes = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    return codes, 0.5 + torch.rand(*shape, generator=generator)


def _float8_by_output(generator, rows, columns, dtype):
    codes, scale = _float8(generator, rows, columns, (rows, 1))
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def _float8_by_tensor(generator, rows, columns, dtype):
    codes, scale = _float8(generator, rows, columns, (1,))
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def _float8_by_block(generator, rows, columns, dtype):
    codes, scale = _float8(generator, rows, columns, (rows // 16, columns // 32))
    meant = codes.float() * scale.repeat_interleave(16, 0).repeat_interleave(32, 1)
    return {"weight": codes, "weight_scale_inv": scale}, meant


def _int8_by_output(generator, rows, columns, dtype):
    codes, scales = int8(torch.randn(rows, columns, generator=generator))
    return {"weight": codes, "weight_scale": scales}, codes * scales


def _scheme(packing, weights, inputs=None):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"format": packing, "quantization_status": "compressed", "ignore": [], "config_groups": {"group_0": group}}


FLOAT = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}
FORMATS = {
    "AWQ": Format("awq", {"bits": 4, "group_size": GROUP_SIZE, "zero_point": True}, _awq),
    "GPTQ": Format("gptq", {"bits": 4, "group_size": GROUP_SIZE, "sym": True, "desc_act": False}, _gptq),
    "compressed-tensors int4": _packed(4, GROUP_SIZE, True),
    "compressed-tensors int4 by output": _packed(4, None, True),
    "compressed-tensors int4 with zero points": _packed(4, GROUP_SIZE, False),
    "compressed-tensors int8": _packed(8, GROUP_SIZE, True),
    "compressed-tensors int8 by output": _packed(8, None, True),
    "FP8 by output": Format("compressed-tensors", _scheme("float-quantized", FLOAT), _float8_by_output),
    "FP8 by tensor": Format("fp8", {"activation_scheme": "dynamic"}, _float8_by_tensor),
    "FP8 by block": Format("fp8", {"activation_scheme": "dynamic", "weight_block_size": [16, 32]}, _float8_by_block),
    "int8 and inputs in 8 bits": Format("compressed-tensors", W8A8, _int8_by_output),
}
"""Every format that vLLM's methods read from standard checkpoints and our kernels read, too."""


def w8a8(model, path):
    """Write `model` with its blocks' linears in W8A8; returns it with the weights that these mean."""
    tensors = load_file(path / "model.safetensors")
    for name in _linears(model):
        codes, scales = int8(tensors.pop(f"{name}.weight").float())
        model.get_submodule(name).weight.data.copy_(codes * scales)
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scales}
    return _write(model, path, tensors, W8A8)


def gptq(model, path, group=32):
    """Write `model` with its blocks' linears in GPTQ's 4-bit format; returns it with the weights that these mean."""

    def one(weight):
        grouped = weight.unflatten(0, (-1, group))
        scales = (grouped.abs().amax(1) / 7).half()
        codes = (grouped / scales.float().unsqueeze(1)).round().clamp(-8, 7) + 8
        words = {
            "qweight": pack(codes.flatten(0, 1).t(), 4).t().contiguous(),
            "qzeros": pack(torch.full_like(scales, 7), 4),
            "g_idx": (torch.arange(weight.shape[0]) // group).to(torch.int32),
        }
        return {**words, "scales": scales}, ((codes - 8) * scales.float().unsqueeze(1)).flatten(0, 1)

    method = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": True, "desc_act": False}
    return _words(model, path, one, method)


def awq(model, path, group=32):
    """Write `model` with its blocks' linears in AWQ's format; returns it with the weights that these mean."""

    def one(weight):
        grouped = weight.unflatten(0, (-1, group))
        low, high = grouped.amin(1), grouped.amax(1)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
        codes = (grouped / scales.float().unsqueeze(1) + zeros.unsqueeze(1)).round().clamp(0, 15)
        meant = ((codes - zeros.unsqueeze(1)) * scales.float().unsqueeze(1)).flatten(0, 1)
        words = {"qweight": pack(codes.flatten(0, 1), 4, AWQ_ORDER), "qzeros": pack(zeros, 4, AWQ_ORDER)}
        return {**words, "scales": scales}, meant

    method = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return _words(model, path, one, method)


def _words(model, path, one, method):
    """Write `model` in a format of packed words: from a weight ``[in, out]`` its tensors and what they mean."""
    tensors = load_file(path / "model.safetensors")
    for name in _linears(model):
        own, meant = one(tensors.pop(f"{name}.weight").float().t())
        model.get_submodule(name).weight.data.copy_(meant.t())
        tensors |= {f"{name}.{part}": tensor for part, tensor in own.items()}
    return _write(model, path, tensors, method)


def layer_errors(served, ours, dtype=torch.float32):
    """Name of a sparse layer in vLLM -> its largest error relative to its largest output: it computes in bfloat16.

    Args:
        served: vLLM's model.
        ours: the same one in transformers, merged.
        dtype: that `ours` computes in; distances from a centre are masked as they are rounded.
    """
    errors = {}
    shards = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    for name, module in served.named_modules():
        parent, _, leaf = name.rpartition(".")
        if leaf in (*shards, "o_proj", "down_proj"):
            assert type(module.quant_method.inner).__name__ != "UnquantizedLinearMethod"
            x = torch.randn(5, module.input_size, generator=torch.Generator().manual_seed(1)).bfloat16()
            parts = [ours.get_submodule(f"{parent}.{shard}") for shard in shards.get(leaf, [leaf])]
            expected = torch.cat([part.to(dtype)(x.to(dtype)) for part in parts], dim=-1).float()
            errors[name] = ((module(x)[0].float() - expected).abs().max() / expected.abs().max()).item()
    return errors


def _linears(model):
    return [name for site in find_sites(model) for name in site.modules]


def _write(model, path, tensors, method):
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    return model
