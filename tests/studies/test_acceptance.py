# SPDX-License-Identifier: Apache-2.0
"""Accepted drafts: counted at positions of a text, in runs, and what they are worth."""

import pytest
import torch
from masks import make_masks
from tiny_models import make_tiny_llama

from spon_plugin import sparse_inputs
from spon_plugin.decoder.masked_linears import MaskedLinears
from spon_plugin.studies.acceptance import StepCosts, acceptance

PATH = "model.layers.0.mlp.down_proj"
WINDOWS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    return make_tiny_llama()


def measure(model, threshold, drafts=(1, 2, 3)):
    masks = make_masks({PATH: torch.tensor([threshold])}, {PATH: torch.full((96,), 0.3 * threshold)})
    method = MaskedLinears.of(model, masks)
    return masks, acceptance(model, method, WINDOWS, drafts, alphas=method.alphas)


def test_a_model_accepts_all_of_its_own_tokens(model):
    _, found = measure(model, 0.0)
    assert (found.greedy, found.tokens) == (1.0, 120)
    assert found.sampled == pytest.approx(1, abs=1e-5)
    assert found.greedy_tokens == {1: 2.0, 2: 3.0, 3: 4.0}


@torch.no_grad()
def test_shares_and_runs_are_those_counted_one_by_one(model):
    masks, found = measure(model, 0.3)
    p = model(WINDOWS).logits
    with sparse_inputs(model, masks):
        q = model(WINDOWS).logits
    same = p.argmax(-1) == q.argmax(-1)
    overlap = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1)
    assert 0.2 < found.greedy < 0.98
    assert found.greedy == pytest.approx(same.double().mean().item())
    assert found.sampled == pytest.approx(overlap.mean().item(), rel=1e-4)
    tokens = []
    for row in same.tolist():
        for start in range(40 - 2):
            run = row[start : start + 3]
            tokens.append(1 + [*run, False].index(False))
    assert found.greedy_tokens[3] == pytest.approx(sum(tokens) / len(tokens))
    assert found.sampled_tokens[1] == pytest.approx(1 + found.sampled)


def test_what_a_round_is_worth():
    costs = StepCosts(plain=12.0, dense=10.0, sparse=4.0, verify={1: 11.0, 3: 13.0})
    assert costs.speedup({1: 1.8, 3: 3.0}) == {1: pytest.approx(1.8 * 10 / 15), 3: pytest.approx(3 * 10 / 25)}
