# SPDX-License-Identifier: Apache-2.0
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
