# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention: `kv_b_proj` stays dense, whatever the adapter says, and the linears around it do not."""

import logging
from dataclasses import replace

import pytest
import torch
from engines import engine, generate, make_adapter, make_model, override, peft_model

from spon_plugin import write_adapter

pytestmark = pytest.mark.slow

# vLLM's CPU kernel for MLA knows one shape, DeepSeek's: 512 latent channels and 64 rotated ones.
SHAPE = dict(
    num_key_value_heads=4, first_k_dense_replace=2, kv_lora_rank=512, qk_nope_head_dim=32, qk_rope_head_dim=64,
    v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
)  # fmt: skip
FUSED = ["q_a_proj", "kv_a_proj_with_mqa"]


@pytest.mark.parametrize("q_lora_rank", [None, 64], ids=["q_proj", "fused_qkv_a_proj"])
def test_kv_b_proj_stays_dense(tmp_path, monkeypatch, q_lora_rank):
    from vllm.model_executor.models.deepseek_v2 import DeepSeekV2FusedQkvAProjLinear

    from spon_vllm import report
    from spon_vllm.linear import SponLinearMethod

    make = DeepSeekV2FusedQkvAProjLinear.__init__

    def as_on_hopper(layer, *args, **kwargs):  # with DeepSeek V3's sizes vLLM would go past the quantization method
        make(layer, *args, **kwargs)
        layer._use_min_latency_gemm = True

    monkeypatch.setattr(DeepSeekV2FusedQkvAProjLinear, "__init__", as_on_hopper)
    base = tmp_path / "base"
    model = make_model(base, "DeepseekV2ForCausalLM", q_lora_rank=q_lora_rank, **SHAPE)
    adapter = make_adapter(tmp_path / "adapter", model, base)
    latent = [name for name in adapter.masks if name.endswith("kv_b_proj")]
    assert len(latent) == 2
    plain = replace(
        adapter,
        masks={name: mask for name, mask in adapter.masks.items() if name not in latent},
        peft={**adapter.peft, "target_modules": [n for n in adapter.peft["target_modules"] if n != "kv_b_proj"]},
    )
    write_adapter(plain, tmp_path / "plain")

    # A logger of our own: vLLM configures its loggers anew when it starts.
    records, logger, handler = [], logging.Logger("spon"), logging.Handler()
    handler.emit = records.append
    logger.addHandler(handler)
    monkeypatch.setattr(report, "logger", logger)
    ours = peft_model(base, tmp_path / "plain").merge_and_unload()

    def layers(served):
        """Name in a layer of attention -> its method, and its largest distance from ours."""
        found = {}
        for name, module in served.named_modules():
            parent, _, leaf = name.rpartition(".")
            if not parent.endswith(".self_attn") or not hasattr(module, "quant_method"):
                continue
            x = torch.randn(5, module.input_size, generator=torch.Generator().manual_seed(1))
            shards = FUSED if leaf == "fused_qkv_a_proj" else [leaf]
            expected = torch.cat([ours.get_submodule(f"{parent}.{shard}")(x) for shard in shards], dim=-1)
            found[leaf] = type(module.quant_method), (module(x)[0] - expected).abs().max().item()
        return found

    # vLLM's attention for processors with AMX takes no float32.
    backend = {"attention_backend": "CPU_MLA"} if torch.cpu._is_amx_tile_supported() else {}
    # Layer by layer: as a whole, vLLM's CPU attention for MLA and transformers' differ for dense models too.
    with engine(base, **override(tmp_path / "adapter", token_mode="all"), **backend) as llm:
        found = llm.apply_model(layers)[0]
        tokens, logprobs = generate(llm)
    sparse = {"q_proj", "kv_a_proj_with_mqa"} if q_lora_rank is None else {"fused_qkv_a_proj", "q_b_proj"}
    assert {name for name, (method, _) in found.items() if method is SponLinearMethod} == {*sparse, "o_proj"}
    assert "kv_b_proj" in found and max(error for _, error in found.values()) < 1e-4, found
    warnings = [r.getMessage() for r in records if "stay dense" in r.getMessage()]
    assert len(warnings) == 1 and "2 linears" in warnings[0] and ", ".join(sorted(latent)) in warnings[0]

    with engine(base, **override(tmp_path / "plain", token_mode="all"), **backend) as llm:
        same, same_logprobs = generate(llm)
    assert torch.equal(same, tokens) and torch.equal(same_logprobs, logprobs)
    assert len([r for r in records if "stay dense" in r.getMessage()]) == 1
