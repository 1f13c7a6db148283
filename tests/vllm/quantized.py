# SPDX-License-Identifier: Apache-2.0
"""Tiny quantized checkpoints in the formats of their hosts, and what their weights mean."""

import json

import pytest
import torch
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
    tensors = load_file(path / "model.safetensors")
    shifts = torch.arange(0, 32, 4)

    def pack(values, dim):  # eight 4-bit numbers in an int32
        values = values.long().unflatten(dim, (-1, 8)).movedim(dim + 1, -1)
        return (
            (values << shifts)
            .sum(-1)
            .to(torch.int64)
            .bitwise_and(0xFFFFFFFF)
            .sub(((values << shifts).sum(-1) >= 2**31).long() * 2**32)
            .to(torch.int32)
        )

    for name in _linears(model):
        weight = tensors.pop(f"{name}.weight").float().t()  # [in, out]
        grouped = weight.unflatten(0, (-1, group))
        scales = (grouped.abs().amax(1) / 7).half()
        codes = (grouped / scales.float().unsqueeze(1)).round().clamp(-8, 7) + 8
        meant = ((codes - 8) * scales.float().unsqueeze(1)).flatten(0, 1)
        model.get_submodule(name).weight.data.copy_(meant.t())
        tensors[f"{name}.qweight"] = pack(codes.flatten(0, 1), 0).contiguous()
        tensors[f"{name}.qzeros"] = pack(torch.full_like(scales, 7), 1).contiguous()
        tensors[f"{name}.scales"] = scales.contiguous()
        tensors[f"{name}.g_idx"] = (torch.arange(weight.shape[0]) // group).to(torch.int32)
    method = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": True, "desc_act": False}
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


def needs_kernel(name):
    """Skip where vLLM's CPU build has no such operator: some want AVX-512."""
    if not hasattr(torch.ops._C, name):
        pytest.skip(f"this machine's vLLM has no {name}")


def _linears(model):
    return [name for site in find_sites(model) for name in site.modules]


def _write(model, path, tensors, method):
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    return model
