# SPDX-License-Identifier: Apache-2.0
"""A cache layer with room holds what transformers' own would, whatever is done to it, and never writes elsewhere."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from spon_transformers.growing_cache import GrowingLayer, growing_layer


def tokens(count, seed=0, sequences=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, sequences, 3, count, 4, generator=generator).unbind()


def pair(count=5, sequences=1):
    """transformers' own layer and ours, with the same tokens."""
    own = DynamicLayer()
    own.update(*tokens(count, sequences=sequences))
    return own, GrowingLayer.of(own)


def same(own, grown):
    return torch.equal(own.keys, grown.keys) and torch.equal(own.values, grown.values)


DOINGS = {
    "one token": lambda layer: layer.update(*tokens(1, 1)),
    "several tokens": lambda layer: layer.update(*tokens(7, 2)),
    "more than there is room for": lambda layer: layer.update(*tokens(600, 3)),
    "crop": lambda layer: layer.crop(-2),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([0])),
    "reset and fill": lambda layer: (layer.reset(), layer.update(*tokens(4, 4))),
    "set": lambda layer: (
        setattr(layer, "keys", layer.keys[:, :, 1:]),
        setattr(layer, "values", layer.values[:, :, 1:]),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("second", DOINGS)
@pytest.mark.parametrize("first", DOINGS)
def test_holds_what_transformers_own_does(first, second):
    own, grown = pair()
    for doing in (first, "one token", second, "several tokens"):
        DOINGS[doing](own)
        DOINGS[doing](grown)
        assert same(own, grown), doing
        assert own.get_seq_length() == grown.get_seq_length()
        assert own.get_mask_sizes(1) == grown.get_mask_sizes(1)


@torch.no_grad()
def test_what_was_handed_out_stays_as_it_was():
    _, grown = pair()
    grown.update(*tokens(1, 1))
    seen = grown.keys
    kept = seen.clone()
    grown.crop(-3)
    grown.update(*tokens(2, 2))
    assert torch.equal(seen, kept)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_write_to_places_of_their_own(copied):
    own, grown = pair()
    grown.update(*tokens(1, 1))
    own.update(*tokens(1, 1))
    other = copied(grown)
    other.update(*tokens(1, 8))
    grown.update(*tokens(1, 9))
    own.update(*tokens(1, 9))
    assert same(own, grown)
    assert torch.equal(other.keys[:, :, -1:], tokens(1, 8)[0])


@torch.no_grad()
def test_a_token_more_copies_nothing():
    _, grown = pair()
    grown.update(*tokens(1, 1))
    place = grown.keys.data_ptr()
    for _ in range(100):
        grown.update(*tokens(1, 2))
    assert grown.keys.data_ptr() == place


def test_gradients_flow_as_they_do_through_transformers_own():
    own, grown = pair()
    with torch.no_grad():
        for layer in (own, grown):
            layer.update(*tokens(1, 5))  # there is room from now on
    for layer in (own, grown):
        first, second = (tokens(2, seed)[0].requires_grad_() for seed in (1, 2))
        losses = [layer.update(keys, keys.detach())[0].square().sum() for keys in (first, second)]
        sum(losses).backward()
        assert torch.allclose(first.grad, 4 * first.detach()) and torch.allclose(second.grad, 2 * second.detach())


def test_tokens_of_inference_mode_are_not_written_behind_outside_of_it():
    own, _ = pair()
    with torch.inference_mode():
        grown = GrowingLayer.of(own)
        grown.update(*tokens(1, 1))
    own.update(*tokens(1, 1))
    with torch.no_grad():
        grown.update(*tokens(1, 2))
    own.update(*tokens(1, 2))
    assert same(own, grown)


def cache_of(layer):
    cache = DynamicCache()
    cache.layers.append(layer)
    return cache


def test_a_plain_layer_is_replaced_once():
    own, _ = pair()
    cache = cache_of(own)
    grown = growing_layer(cache, 0, torch.zeros(1))
    assert type(grown) is GrowingLayer
    assert cache.layers == [grown] and growing_layer(cache, 0, torch.zeros(1)) is grown
    assert cache.get_seq_length() == 5


REFUSED = {
    "no cache": (lambda: None, torch.float32),
    "no such layer": (DynamicCache, torch.float32),
    "nothing held": (lambda: cache_of(DynamicLayer()), torch.float32),
    "two sequences": (lambda: cache_of(pair(sequences=2)[0]), torch.float32),
    "another dtype": (lambda: cache_of(pair()[0]), torch.bfloat16),
}


@pytest.mark.parametrize("cache, dtype", REFUSED.values(), ids=REFUSED)
def test_others_are_left_alone(cache, dtype):
    assert growing_layer(cache(), 0, torch.zeros(1, dtype=dtype)) is None
