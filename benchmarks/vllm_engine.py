# SPDX-License-Identifier: Apache-2.0
"""vLLM's dense model beside the models of `benchmarks.decode`, one engine in this process, a token a step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.variants import Step, Variant
from benchmarks.vllm_perplexity import vllm_perplexity
from spon_plugin.machine import name_of


def variant(path: Path, dtype: torch.dtype, read: float, held: int, context: int) -> Variant:
    """VLLM on a checkpoint as it is, on the threads of ``OMP_NUM_THREADS``.

    Args:
        path: the directory of the model; it needs no tokenizer.
        dtype: of activations.
        read: bytes of weights that a token reads.
        held: bytes of weights.
        context: the most tokens that a request will have.

    Raises:
        ImportError: vLLM is not installed.
    """
    # vLLM's own processes would not take turns with this one, and binding threads would bind torch's.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    engine = LLM(
        str(path), dtype=name_of(dtype), skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=1,
        max_model_len=max(context, 1024), enable_prefix_caching=False,
    )  # fmt: skip
    state = {"requests": 0}

    def start(ids: torch.Tensor) -> Step:
        return _step(engine, ids, state, context)

    def perplexity(windows: torch.Tensor) -> float:
        _end(engine, state)  # or its output would come among those of the windows
        return vllm_perplexity(engine, windows)

    return Variant(f"vLLM {name_of(dtype)} dense", start, perplexity, read, held)


def _end(engine: Any, state: dict[str, int]) -> None:
    """Take back the request that is being decoded, if there is one."""
    if state["requests"]:
        engine.llm_engine.abort_request([str(state["requests"])])


def _step(engine: Any, ids: torch.Tensor, state: dict[str, int], context: int) -> Step:
    from vllm import SamplingParams

    inner = engine.llm_engine
    _end(engine, state)
    state["requests"] += 1
    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=context - ids.shape[1], detokenize=False)
    inner.add_request(str(state["requests"]), {"prompt_token_ids": ids[0].tolist()}, sampling)

    def step() -> None:
        while not inner.step():  # a step may only schedule
            pass

    step()
    return step
