# SPDX-License-Identifier: Apache-2.0
"""Windows that a model cannot read are named before work."""

import pytest
import torch
from tiny_models import make_tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from spon_plugin import SponError
from spon_transformers.windows import check_ids, check_length, learned_positions

SIZE = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
MODELS = {
    "gpt2": ({"n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64}, 24),
    "opt": ({**SIZE, "max_position_embeddings": 24, "ffn_dim": 32, "word_embed_proj_dim": 16}, 24),
    "gpt_neo": ({**SIZE, "max_position_embeddings": 24, "num_layers": 1, "num_heads": 2,
                 "attention_types": [[["global"], 1]]}, 24),
    "gpt_bigcode": ({"n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64}, 24),
    "gpt_neox": ({**SIZE, "max_position_embeddings": 24, "intermediate_size": 32}, None),
    "bloom": ({"vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_the_limit_is_that_of_the_model_itself(kind):
    changes, limit = MODELS[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **changes)).eval()
    assert learned_positions(model) == limit
    if limit is None:
        check_length(model, 10_000)
        return
    check_length(model, limit)
    model(input_ids=torch.zeros(1, limit, dtype=torch.int64))
    with pytest.raises(SponError, match=f"window: got {limit + 1}, expected at most {limit} tokens"):
        check_length(model, limit + 1)
    with pytest.raises(SponError, match=f"length: got {limit + 1}"):
        check_length(model, limit + 1, "length")
    with pytest.raises((IndexError, RuntimeError)):  # what the check comes before
        model(input_ids=torch.zeros(1, limit + 1, dtype=torch.int64))


def test_ids_beyond_the_vocabulary_are_named():
    model = make_tiny_llama(vocab_size=100)
    check_ids(model, torch.tensor([[0, 99]]))
    check_ids(model, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(SponError, match="tokenizer: got 'token id 100', expected ids below 100"):
        check_ids(model, torch.tensor([[0, 100]]))
