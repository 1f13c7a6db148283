# SPDX-License-Identifier: Apache-2.0
"""The output head in int8: what logits it gives, tied or not, first and after a reload, and when it is rounded."""

import json

import pytest
import torch
from engines import (
    PROMPTS,
    engine,
    forced,
    generate,
    make_adapter,
    make_model,
    merge,
    override,
    peft_model,
    saving,
    with_int8_head,
)
from test_vllm_errors import configure
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from spon_vllm.head import method_for
from spon_vllm.report import Coverage

VOCABULARY = 250
"""vLLM pads it to 256."""


def prompt_logprobs(llm, prompts):
    """Logprobs of the prompts' tokens after the first, ``[prompts, tokens - 1]``: more rows than a kernel takes."""
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
    return torch.tensor(
        [
            [step[token].logprob for step, token in zip(out.prompt_logprobs[1:], prompt[1:], strict=True)]
            for out, prompt in zip(outputs, prompts, strict=True)
        ]
    )


def check(said, of_prompts, reference, prompts):
    """Against a reference without masks, which rounding could flip: as test_biases_alone_are_those_of_peft does."""
    tokens, logprobs = said
    in_float = forced(reference, tokens, prompts)
    own = with_int8_head(reference)
    assert (logprobs - forced(own, tokens, prompts)).abs().max() <= 1e-4
    heads = [prompt[:1] for prompt in prompts]
    expected = forced(own, torch.tensor([prompt[1:] for prompt in prompts]), heads)
    assert (of_prompts - expected).abs().max() <= 1e-4
    assert (logprobs - in_float).abs().mean() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "of its own"])
def test_logits_are_those_of_the_rounded_head_before_and_after_a_reload(tied, tmp_path):
    prompts = [[token % VOCABULARY for token in prompt] for prompt in PROMPTS]
    bases = [tmp_path / "first", tmp_path / "second"]
    models = [make_model(b, seed=s, vocab_size=VOCABULARY, tie_word_embeddings=tied) for s, b in enumerate(bases)]
    make_adapter(tmp_path / "adapter", models[0], bases[0], sparsity=0, alpha=0.3, prompts=prompts)
    with engine(bases[0], **override(tmp_path / "adapter", token_mode="all", head="int8")) as llm:
        first = generate(llm, prompts, 8), prompt_logprobs(llm, prompts)
        held = llm.apply_model(lambda m: (m.lm_head.weight.numel(), m.model.embed_tokens.weight.numel()))[0]
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(bases[1])})
        second = generate(llm, prompts, 8), prompt_logprobs(llm, prompts)
    assert held == ((256 * 128, 256 * 128) if tied else (0, 256 * 128))
    for (said, of_prompts), base in zip((first, second), bases, strict=True):
        check(said, of_prompts, peft_model(base, tmp_path / "adapter"), prompts)


@pytest.mark.slow
def test_a_head_that_the_adapter_has_trained_is_rounded(tmp_path):
    model = make_model(tmp_path / "base")
    make_adapter(tmp_path / "plain", model, tmp_path / "base", sparsity=0, alpha=0.3)
    trained = 0.1 * torch.randn(256, 128, generator=torch.Generator().manual_seed(1))
    saving(tmp_path / "plain", tmp_path / "adapter", {"lm_head.weight": trained})
    with engine(tmp_path / "base", **override(tmp_path / "adapter", token_mode="all", head="int8")) as llm:
        said, of_prompts = generate(llm, count=8), prompt_logprobs(llm, PROMPTS)
    reference = peft_model(tmp_path / "base", tmp_path / "plain")
    reference.get_output_embeddings().weight.data.copy_(trained)
    check(said, of_prompts, reference, PROMPTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directories of a base, an adapter, and the two merged."""
    path = tmp_path_factory.mktemp("head")
    make_adapter(path / "adapter", make_model(path / "base"), path / "base")
    return path / "base", path / "adapter", merge(path / "base", path / "adapter", path / "merged")


def head(model, **arguments):
    """What the head of such a server is rounded to."""
    return configure(model, **arguments).quant_config.settings.head


def test_the_head_is_rounded_where_it_is_asked_for(made, monkeypatch):
    base, adapter, _ = made
    assert head(base, **override(adapter)) is None
    assert head(base, **override(adapter, head="int8")) == "int8"
    monkeypatch.setenv("SPON_HEAD", "int8")
    assert head(base, **override(adapter)) == "int8"
    assert head(base, **override(adapter, head="none")) is None


def test_a_merged_checkpoint_says_what_its_head_is(made, monkeypatch):
    _, _, merged = made
    only_mode = {"hf_overrides": {"quantization_config": {"quant_method": "spon", "token_mode": "all"}}}
    stored = json.loads((merged / "config.json").read_text())
    assert head(merged) is None
    stored["quantization_config"]["head"] = "int8"
    (merged / "config.json").write_text(json.dumps(stored))
    assert head(merged) == head(merged, **only_mode) == "int8"
    monkeypatch.setenv("SPON_HEAD", "none")
    assert head(merged) is head(merged, **only_mode) is None


def test_a_quantized_base_has_its_head_in_int8_unless_it_is_asked_not_to(made, tmp_path):
    from quantized import gptq

    _, adapter, _ = made
    gptq(make_model(tmp_path / "base"), tmp_path / "base")
    assert head(tmp_path / "base", **override(adapter)) == "int8"
    assert head(tmp_path / "base", **override(adapter, head="none")) is None


def test_heads_that_are_quantized_or_asked_for_in_another_dtype_stay(made):
    base, adapter, _ = made
    layer, own = ParallelLMHead.__new__(ParallelLMHead), object()
    assert method_for(layer, own, Coverage()) is own
    assert method_for(torch.nn.Linear(1, 1), own, Coverage()) is own
    source = override(adapter, head="int8")
    with set_current_vllm_config(configure(base, **source)):
        assert method_for(layer, None, Coverage()) is not None
    source["hf_overrides"]["head_dtype"] = "bfloat16"
    with set_current_vllm_config(configure(base, **source)):
        assert method_for(layer, None, Coverage()) is None
