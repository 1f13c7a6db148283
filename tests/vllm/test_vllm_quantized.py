# SPDX-License-Identifier: Apache-2.0
"""Engines of vLLM's on a checkpoint that `spon quantize` wrote: the adapter, merged into it, and on two workers.

All of them have their output head in int8, as is the default there.
"""

import pytest
import torch
from engines import engine, forced, generate, make_adapter, make_model, merge, override, peft_model, with_int8_head
from transformers import AutoModelForCausalLM, AutoTokenizer

from spon_vllm.settings import ROWS

pytest.importorskip("compressed_tensors", reason="pip install 'spon-plugin[quantize]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of two bases in eight bits, which few rows are multiplied by in float32, and of an adapter."""
    from spon_transformers.quantize import Rounding, quantize, save_quantized

    path = tmp_path_factory.mktemp("quantized")
    for seed, name in enumerate(("first", "second")):
        model = make_model(path / f"{name}-dense", "Qwen2ForCausalLM", seed)
        if not seed:
            make_adapter(path / "adapter", model, path / "first", sparsity=0.4, per_linear=True)
        quantize(model, Rounding(8, 32))
        save_quantized(model, path / name)
        AutoTokenizer.from_pretrained(path / f"{name}-dense").save_pretrained(path / name)
    return path / "first", path / "second", path / "adapter"


@pytest.fixture(scope="module")
def served(bases):
    """What the engine generates on the first base, then on the second, and how the layers hold their weights."""
    first, second, adapter = bases
    with engine(first, **override(adapter, token_mode="all", weights=ROWS)) as llm:
        before = generate(llm)
        ways = llm.apply_model(lambda m: [p.quant_method.weights for p in m.modules() if hasattr(p, "spon_threshold")])[
            0
        ]
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(second)})
        after = generate(llm)
    return before, after, ways


def test_engine_says_what_peft_says_before_and_after_a_reload(bases, served):
    first, second, adapter = bases
    before, after, ways = served
    assert ways == [ROWS] * 8
    for base, (tokens, logprobs) in ((first, before), (second, after)):
        reference = with_int8_head(peft_model(base, adapter))
        apart = (logprobs - forced(reference, tokens)).abs()
        # Rounding moves an input across its threshold now and then, on one processor or another.
        assert apart.median() <= 1e-5 and apart.mean() <= 0.01
    dense = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32).eval()
    assert (before[1] - forced(dense, before[0])).abs().mean() > 0.05


def test_merged_into_the_quantized_base(bases, served, tmp_path):
    first, _, adapter = bases
    merged = merge(first, adapter, tmp_path / "merged")
    settings = {"quantization_config": {"quant_method": "spon", "token_mode": "all", "weights": ROWS, "head": "int8"}}
    with engine(merged, hf_overrides=settings) as llm:
        tokens, logprobs = generate(llm)
    assert torch.equal(tokens, served[0][0])
    assert (logprobs - served[0][1]).abs().mean() <= 0.001


def test_two_workers_say_what_one_says(bases, served, monkeypatch):
    for name, value in {"OMP_THREADS_BIND": "nobind", "WORKER_MULTIPROC_METHOD": "spawn"}.items():
        monkeypatch.setenv(f"VLLM_{'CPU_' if 'OMP' in name else ''}{name}", value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first, _, adapter = bases
    with engine(first, **override(adapter, token_mode="all", weights=ROWS), tensor_parallel_size=2) as llm:
        tokens, logprobs = generate(llm)
    assert torch.equal(tokens, served[0][0])
    assert (logprobs - served[0][1]).abs().mean() <= 0.001
