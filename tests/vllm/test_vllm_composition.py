# SPDX-License-Identifier: Apache-2.0
"""SPON together with vLLM's other features, on tiny models in float32."""

import logging

import pytest
import torch
from engines import (
    DECODE,
    PROMPTS,
    dense_model,
    engine,
    forced,
    generate,
    make_adapter,
    make_model,
    override,
    peft_model,
)
from peft import LoraConfig, PeftModel, get_peft_model
from quantized import gptq, layer_errors, w8a8

from spon_vllm import ops

pytestmark = pytest.mark.slow

# Three drafts as soon as a token appears again.
SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Directory of a base, of its adapter, and what the engine generates with nothing else on."""
    path = tmp_path_factory.mktemp("llama")
    model = make_model(path / "base")
    make_adapter(path / "adapter", model, path / "base")
    with engine(path / "base", **override(path / "adapter", token_mode="all")) as llm:
        return path / "base", path / "adapter", generate(llm)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"enable_chunked_prefill": True, "max_num_batched_tokens": 8}, id="chunked prefill"),
        pytest.param({"speculative_config": SPECULATION}, id="ngram speculation"),
    ],
)
def test_feature_changes_no_token(llama, arguments):
    base, adapter, (tokens, logprobs) = llama
    with engine(base, **override(adapter, token_mode="all"), **arguments) as llm:
        ours, our_logprobs = generate(llm)
    assert torch.equal(ours, tokens)
    assert (our_logprobs - logprobs).abs().mean() <= 0.001


def test_drafts_are_verified_densely_where_prompts_are_dense(llama, monkeypatch):
    base, adapter, _ = llama
    rule, seen = ops.runs_sparse, set()

    def watch(x, limit):
        seen.add((x.shape[0], rule(x, limit)))
        return rule(x, limit)

    monkeypatch.setattr(ops, "runs_sparse", watch)
    prompts = [(PROMPTS[0][:3] * 4), PROMPTS[1][:5]]
    with engine(base, **override(adapter, **DECODE), speculative_config=SPECULATION) as llm:
        generate(llm, prompts, together=False)
    assert {(1, True), (4, False), (5, False)} <= seen  # one token, one with three drafts, a short prompt
    assert all(tokens == 1 for tokens, sparse in seen if sparse)


def test_prefix_caching_changes_no_token(llama):
    base, adapter, _ = llama
    prompts = [(PROMPTS[0] * 8)[:80], (PROMPTS[0] * 8)[:80] + PROMPTS[1]]
    with engine(base, **override(adapter, token_mode="all")) as llm:
        expected = [generate(llm, [prompt])[0] for prompt in prompts]
    with engine(base, **override(adapter, token_mode="all"), enable_prefix_caching=True, block_size=32) as llm:
        generate(llm, [prompts[0]])
        ours = [generate(llm, [prompt])[0] for prompt in prompts]
        hits = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.prefix_cache_stats
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert hits is None or hits.hits > 0


def test_lora_on_top(llama, tmp_path):
    from vllm.lora.request import LoRARequest

    base, adapter, (plain, _) = llama
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(dense_model(base), config).save_pretrained(tmp_path / "lora")
    with engine(base, **override(adapter, token_mode="all"), enable_lora=True, max_lora_rank=8) as llm:
        request = LoRARequest("lora", 1, str(tmp_path / "lora"))
        tokens, logprobs = generate(llm, count=8, lora_request=request)
        without, _ = generate(llm, count=8)
    assert torch.equal(without, plain[:, :8]) and not torch.equal(tokens, without)
    both = PeftModel.from_pretrained(peft_model(base, adapter).merge_and_unload(), str(tmp_path / "lora")).eval()
    assert (logprobs - forced(both, tokens)).abs().mean() <= 0.01


@pytest.mark.parametrize("per_linear", [False, True], ids=["by site", "by linear"])
@pytest.mark.parametrize("quantize", [gptq, w8a8])
def test_quantized_base(tmp_path, quantize, per_linear, monkeypatch):
    model = quantize(make_model(tmp_path / "base"), tmp_path / "base")
    model.save_pretrained(tmp_path / "meant")
    make_adapter(tmp_path / "adapter", model, tmp_path / "base", sparsity=0.4, per_linear=per_linear)
    monkeypatch.setenv("SPON_ADAPTER", str(tmp_path / "adapter"))
    monkeypatch.setenv("SPON_TOKEN_MODE", "all")
    ours = peft_model(tmp_path / "meant", tmp_path / "adapter").merge_and_unload()

    with engine(tmp_path / "base", dtype="bfloat16") as llm:
        errors = llm.apply_model(lambda served: layer_errors(served, ours))[0]
        tokens, logprobs = generate(llm)
    assert len(errors) == 8 and max(errors.values()) < 0.03, errors
    difference = (logprobs - forced(ours, tokens)).abs().mean()
    assert difference < (logprobs - forced(dense_model(tmp_path / "meant"), tokens)).abs().mean() / 4


def test_experts_and_routers_stay_dense(tmp_path):
    model = make_model(
        tmp_path / "base", "Qwen3MoeForCausalLM", head_dim=32, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=64, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    adapter = make_adapter(tmp_path / "adapter", model, tmp_path / "base")
    assert {name.rpartition(".")[2] for name in adapter.masks} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with engine(tmp_path / "base", **override(tmp_path / "adapter", token_mode="all")) as llm:
        tokens, logprobs = generate(llm, count=8)
    assert (logprobs - forced(peft_model(tmp_path / "base", tmp_path / "adapter"), tokens)).abs().mean() <= 0.01

    # An adapter from elsewhere may name what vLLM cannot make sparse.
    from spon_plugin import Mask, write_adapter

    for name in ("lm_head", "model.layers.0.mlp.gate"):
        adapter.masks[name] = Mask(torch.ones(1), alpha=torch.ones(128))
    write_adapter(adapter, tmp_path / "more")
    from spon_vllm import checks

    # A handler of our own: how often caplog's sees a record depends on what vLLM has set up in this process before.
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "base_model", lambda config: None)  # a router is no torch.nn.Linear here
        patch.setattr(logging.getLogger("vllm.spon"), "handlers", [handler])
        with engine(tmp_path / "base", **override(tmp_path / "more", token_mode="all")) as llm:
            ours, our_logprobs = generate(llm, count=8)
    assert torch.equal(ours, tokens) and (our_logprobs - logprobs).abs().max() < 1e-4
    warnings = [r.getMessage() for r in records if "stay dense" in r.getMessage()]
    assert len(warnings) == 1 and "lm_head, model.layers.0.mlp.gate" in warnings[0]
