# SPDX-License-Identifier: Apache-2.0
"""Text that a model writes by itself: what to calibrate and train on beside other text, or where there is none."""

from __future__ import annotations

from typing import Any

import torch

from spon_plugin.progress import Progress, no_progress

# What a model's own generation config may say otherwise, without which the draws are from its distribution.
_AS_IT_IS: dict[str, Any] = {
    "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
}  # fmt: skip


@torch.no_grad()
def sample_documents(
    model: Any,
    tokenizer: Any,
    tokens: int,
    length: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[str]:
    """Documents of the model's own, each going on from one token of its vocabulary that is drawn at random.

    As LLM-QAT (arXiv 2305.17888, section 3.1) has it, which also takes the likeliest for the next three to five; here
    all are drawn, at temperature 1. What torch draws elsewhere stays as it is.

    Args:
        model: a `PreTrainedModel`.
        tokenizer: its tokenizer.
        tokens: at least so many in all, in whole batches.
        length: tokens of each document.
        batch_size: documents at a time; hundreds on a GPU.
        seed: of everything that is drawn; another batch size draws others.
        progress: called after each batch.
    """
    documents: list[str] = []
    device = model.device
    vocabulary = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])  # a tokenizer may know more
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while len(documents) * length < tokens:
            start = torch.randint(vocabulary, (batch_size, 1)).to(device)
            made = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                **_AS_IT_IS,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                pad_token_id=0,
            )
            documents += tokenizer.batch_decode(made, skip_special_tokens=True)
            progress(min(len(documents) * length, tokens), tokens)
    return documents
