# SPDX-License-Identifier: Apache-2.0
"""Low-rank changes of weights, trained under the masks and merged."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import make_tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from spon_plugin import SponError, find_sites
from spon_plugin.decoder.masked_linears import sparse_inputs
from spon_plugin.sparsifiers import get_sparsifier
from spon_plugin.sparsifiers.match import match_method
from spon_plugin.studies.evaluation import evaluate
from spon_plugin.training.deltas import Deltas
from spon_plugin.training.loop import Teacher, distil
from spon_plugin.training.recipe import Recipe
from spon_plugin.weights import weight_of
from spon_transformers.quantize import Rounding, quantize

WINDOWS = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(0))
RECIPE = Recipe(windows=12, window=32, batch_size=4, epochs=10, learning_rate=0.05, rematch=2)


def make_tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_embd=48, n_layer=2, n_head=4, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


@pytest.fixture(params=[make_tiny_llama, make_tiny_gpt2], ids=["llama", "gpt2"])
def model(request):
    return request.param()


def fit(model):
    return get_sparsifier("sensitivity").fit(model, find_sites(model), WINDOWS, 0.5)


def logits(model, masks, attached=None, alphas=None):
    with torch.no_grad():
        if attached is not None:
            with attached.attach(model, alphas):
                return model(input_ids=WINDOWS[:4]).logits
        with sparse_inputs(model, masks):
            return model(input_ids=WINDOWS[:4]).logits


def drawn(method, size=0.05):
    """The method with deltas that are not zero."""
    generator = torch.Generator().manual_seed(1)
    for up in method.up.values():
        up.data += size * torch.randn(up.shape, generator=generator)
    return method


def test_deltas_begin_as_the_masks_alone(model):
    fitted = fit(model)
    expected = logits(model, fitted.masks)
    torch.testing.assert_close(logits(model, {}, Deltas(fitted, model, 2, 1e-3)), expected, rtol=1e-4, atol=1e-4)


def test_a_merged_model_computes_what_was_trained(model):
    fitted = fit(model)
    masks = fitted.masks
    generator = torch.Generator().manual_seed(2)
    alphas = {path: 0.1 * torch.randn(mask.threshold.numel(), generator=generator) for path, mask in masks.items()}
    method = drawn(Deltas(fitted, model, 2, 1e-3))
    beside, given = logits(model, {}, method, alphas), {n: p.clone() for n, p in model.named_parameters()}
    assert not torch.allclose(beside, logits(model, masks), atol=1e-2)
    with method.merged(model):
        merged = logits(model, {path: replace(mask, alpha=alphas[path]) for path, mask in masks.items()})
    torch.testing.assert_close(merged, beside, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(given[name], parameter) for name, parameter in model.named_parameters())


def test_merging_keeps_to_a_dtype(model):
    fitted = fit(model)
    drawn(Deltas(fitted, model, 2, 1e-3)).merge(model, torch.bfloat16)
    for path in fitted.modules:
        codes = weight_of(model.get_submodule(path)).codes
        assert codes.dtype == torch.float32 and torch.equal(codes, codes.bfloat16().float())


def test_deltas_learn_what_alphas_alone_cannot(model):
    fitted, teacher = fit(model), Teacher(model, WINDOWS)

    def trained(method):
        def match(method, alphas):
            return match_method(model, method, WINDOWS, 0.4, alphas)

        return distil(model, method, fitted, teacher, RECIPE, match=match)

    alone = trained(fitted).losses
    alphas, losses, method = trained(Deltas(fitted, model, 4, 5e-3))
    assert losses[-1]["loss"] < 0.9 * alone[-1]["loss"] and losses[-1]["loss"] < 0.9 * losses[0]["loss"]
    assert evaluate(model, method, WINDOWS, alphas=alphas).masked == pytest.approx(0.4, abs=0.02)
    path = next(iter(fitted.masks))
    assert not torch.equal(method.base.masks[path].threshold, fitted.masks[path].threshold)


def test_the_same_seed_gives_the_same_deltas(tiny_llama):
    fitted = fit(tiny_llama)
    first, again, other = (Deltas(fitted, tiny_llama, 2, 1e-3, seed) for seed in (3, 3, 4))
    path = next(iter(fitted.modules))
    assert torch.equal(first.down[path], again.down[path]) and not torch.equal(first.down[path], other.down[path])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: got 0, expected a positive number"),
        ({"rate": -1.0}, "rate of the deltas: got -1.0, expected a positive number"),
    ],
)
def test_wrong_values_are_said(tiny_llama, options, message):
    with pytest.raises(SponError, match=message):
        Deltas(fit(tiny_llama), tiny_llama, **{"rank": 2, "rate": 1e-3, **options})


def test_quantized_weights_are_refused(tiny_llama):
    quantized = copy.deepcopy(tiny_llama)
    quantize(quantized, Rounding(8, None, True, False))
    with pytest.raises(SponError, match="expected a floating-point one. Train them first, then quantize"):
        Deltas(fit(tiny_llama), quantized, 2, 1e-3)


def test_no_position_may_be_dense_and_no_alpha_without_a_mask(tiny_llama):
    down = get_sparsifier("sensitivity").fit(tiny_llama, find_sites(tiny_llama, ["down_proj"]), WINDOWS, 0.5)
    method = Deltas(down, tiny_llama, 1, 1e-3)
    with pytest.raises(SponError, match="dense_prefix: got 1"):
        Deltas(down.with_dense_prefix(1), tiny_llama, 1, 1e-3)
    with pytest.raises(SponError, match="dense_prefix: got 1"), method.attach(tiny_llama, dense_prefix=1):
        pass
    other = {"model.layers.0.mlp.up_proj": torch.zeros(48)}
    with pytest.raises(SponError, match="expected none"), method.attach(tiny_llama, other):
        pass
