# SPDX-License-Identifier: Apache-2.0
"""llama.cpp beside the models of `benchmarks.decode`, through `llama-cpp-python`, on GGUF files as they are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.variants import Step, Variant
from spon_transformers.gguf_writer import bytes_read


def variant(path: Path, context: int) -> Variant:
    """llama.cpp on a GGUF file, with as many threads as torch.

    Args:
        path: of the file.
        context: the most tokens that it will hold.

    Raises:
        ImportError: `llama-cpp-python` is not installed.
    """
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    model = Llama(str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)
    return Variant(
        f"llama.cpp {path.stem}",
        lambda ids: _step(model, ids),
        lambda windows: _perplexity(path, windows, threads),
        bytes_read(path)[0],
        path.stat().st_size,
    )


def _step(model: Any, ids: torch.Tensor) -> Step:
    model.reset()
    model.eval(ids[0].tolist())

    def step() -> None:
        logits = np.ctypeslib.as_array(model._ctx.get_logits(), (model.n_vocab(),))
        model.eval([int(logits.argmax())])

    return step


def _perplexity(path: Path, windows: torch.Tensor, threads: int) -> float:
    """As `variants.perplexity`."""
    from llama_cpp import Llama

    length = windows.shape[1]
    model = Llama(
        str(path), n_ctx=length, n_batch=length, n_threads=threads, n_threads_batch=threads, logits_all=True,
        verbose=False,
    )  # fmt: skip
    loss, count = 0.0, 0
    for window in windows:
        model.reset()
        model.eval(window.tolist())
        logits = torch.from_numpy(np.asarray(model.scores[: length - 1], dtype=np.float32))
        loss += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        count += length - 1
    return math.exp(loss / count)
