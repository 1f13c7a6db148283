# SPDX-License-Identifier: Apache-2.0
import torch
from tiny_models import make_byte_tokenizer, make_tiny_llama

from spon_transformers.samples import sample_documents


def test_a_tokenizer_may_know_more_than_the_model():
    model, tokenizer = make_tiny_llama(num_hidden_layers=1, vocab_size=8).eval(), make_byte_tokenizer()
    assert len(tokenizer) > 8
    seen = []
    documents = sample_documents(
        model, tokenizer, 40, length=8, batch_size=4, progress=lambda done, of: seen.append((done, of))
    )
    assert len(documents) == 8 and seen == [(32, 40), (40, 40)]


def test_a_models_generation_config_changes_nothing():
    model, tokenizer = make_tiny_llama(num_hidden_layers=1), make_byte_tokenizer()
    expected = sample_documents(model, tokenizer, 64, length=16, batch_size=4)
    own = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "min_p": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.01}
    for name, value in {**own, "top_k": 3, "top_p": 0.5, "temperature": 0.3}.items():
        setattr(model.generation_config, name, value)
    torch.manual_seed(5)
    assert sample_documents(model, tokenizer, 64, length=16, batch_size=4) == expected
