# SPDX-License-Identifier: Apache-2.0
"""Under vLLM's own compilation: the sparse path is taken, and a compile cache keeps no adapter's values."""

import pytest
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
    with_prefix,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def cache(tmp_path, monkeypatch):
    import vllm.envs as envs

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    if hasattr(envs, "disable_envs_cache"):
        envs.disable_envs_cache()
    return tmp_path / "cache"


def test_compiled_engine(tmp_path, cache):
    from spon_vllm.metrics import COUNTERS

    base = tmp_path / "base"
    model = make_model(base)
    first = make_adapter(tmp_path / "first", model, base)
    make_adapter(tmp_path / "bare", model, base, sparsity=0.3, alpha_modules=[], alpha=0)
    make_adapter(tmp_path / "second", model, base, sparsity=0.7, alpha=0.4)

    def run(source, mode, dense_prefix=0):
        with engine(base, **override(source, **{**DECODE, "token_mode": mode}), enforce_eager=False) as llm:
            assert llm.llm_engine.vllm_config.compilation_config.mode > 0
            before = COUNTERS.values()
            tokens, logprobs = generate(llm, count=16)
            counted = [value - before[name] for name, value in COUNTERS.values().items()]
        return tokens, logprobs, tuple(counted[:2])

    tokens, logprobs, calls = run(tmp_path / "first", "decode")
    expected = forced(peft_model(base, with_prefix(first, tmp_path / "first-12", len(PROMPTS[0]))), tokens)
    assert (logprobs - expected).abs().mean() <= 0.001
    assert calls == (8 * 15, 8)  # one dense step for the prompts, 15 sparse ones, eight layers each

    # The same cache, other adapters: without alpha (no bias where the first had one), then with other values.
    for name in ("bare", "second"):
        tokens, logprobs, calls = run(tmp_path / name, "all")
        assert (logprobs - forced(peft_model(base, tmp_path / name), tokens)).abs().mean() <= 0.001
        assert (logprobs - forced(dense_model(base), tokens)).abs().mean() > 0.02
        assert calls == (8 * 16, 0)
    assert any(cache.rglob("*.py")) or any(cache.rglob("*"))
