# SPDX-License-Identifier: Apache-2.0
"""What a token reads of a model, against the sum written out."""

import pytest
import torch
from tiny_models import make_tiny_llama

from spon_plugin import Mask, find_sites
from spon_plugin.studies.token_bytes import stored_bytes

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    return make_tiny_llama(tie_word_embeddings=request.param).to(torch.bfloat16)


def linears(model):
    return {path: m for path, m in model.named_modules() if path.endswith(LINEARS)}


def test_a_dense_model_is_read_but_for_its_embeddings(model):
    held = stored_bytes(model, find_sites(model))
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    numbers = sum(p.numel() for p in model.parameters()) - (0 if tied else model.model.embed_tokens.weight.numel())
    assert held.read() == 2 * numbers and held.weights == numbers and held.bits(held.read()) == 16


def test_skipped_rows_are_not_read_and_masks_are(model):
    sites = find_sites(model)
    held = stored_bytes(model, sites)
    paths = [path for site in sites for path in site.modules]
    dropped = {path: 0.1 * (index % 5) for index, path in enumerate(paths)}
    masks = {path: Mask(torch.tensor([0.5])) for path in paths}
    saved = sum(2 * m.weight.numel() * dropped[path] for path, m in linears(model).items())
    assert held.read(dropped, masks) == pytest.approx(held.read() - saved + 4 * len(sites))
    masks = {path: Mask(torch.tensor([0.5]), alpha=torch.ones(m.in_features)) for path, m in linears(model).items()}
    biases = sum(2 * m.out_features for m in linears(model).values())
    assert held.read(dropped, masks) == pytest.approx(held.read() - saved + 4 * len(sites) + biases)


def test_linears_of_one_input_share_what_is_equal(model):
    held, (site, *_) = stored_bytes(model, find_sites(model)), find_sites(model)
    q, k, v = site.modules
    center = torch.rand(site.in_features)
    own = {path: Mask(torch.rand(site.in_features), center.clone()) for path in (q, k, v)}
    assert held.read({}, own) - held.read({}, {}) - 4 * 4 * site.in_features == sum(held.unbiased[p] for p in own)
    own[v] = own[k]
    assert held.read({}, own) - held.read({}, {}) - 4 * 3 * site.in_features == sum(held.unbiased[p] for p in own)


def test_codes_scales_and_an_int8_head_are_counted_as_they_lie():
    pytest.importorskip("compressed_tensors")
    from spon_transformers.head import round_head
    from spon_transformers.quantize import Rounding, bits_per_weight, quantize

    model = make_tiny_llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    sites = find_sites(model)
    quantize(model, Rounding(4, 32))
    round_head(model, "int8")
    held = stored_bytes(model, sites)
    numbers = sum(site.in_features * model.get_submodule(p).out_features for site in sites for p in site.modules)
    norms = 64 * (2 * len(model.model.layers) + 1)
    head = 256 * 64 + 4 * 256
    assert held.read() == pytest.approx(numbers * bits_per_weight(model) / 8 + 2 * norms + head)
    assert sum(held.codes.values()) == numbers / 2 and held.weights == numbers + norms + 256 * 64
    every = dict.fromkeys(held.codes, 1.0)
    assert held.read(every) == held.read() - numbers / 2  # scales are read all the same
