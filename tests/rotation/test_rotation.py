# SPDX-License-Identifier: Apache-2.0
"""The cost of masks under a rotation, the search for one, and which models can be turned."""

import pytest
import torch
from tiny_models import make_tiny_llama
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from spon_plugin import SponError, find_sites
from spon_plugin.rotation.cost import StreamInputs, dropped_cost, masked_cost, price_for
from spon_plugin.rotation.sample import sample_inputs
from spon_plugin.rotation.search import find_rotation
from spon_transformers.rotate import rotate_model

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
ROTATED = {
    "llama": lambda: make_tiny_llama(tie_word_embeddings=True, vocab_size=128),
    "llama with biases": lambda: make_tiny_llama(attention_bias=True, mlp_bias=True, vocab_size=128),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SMALL, head_dim=8)),
}
REFUSED = {
    "norms after blocks": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8)),
    "experts": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    ),
    "norms that subtract the mean": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})
    ),
}


def ids(count=4, length=32, seed=0):
    return torch.randint(0, 128, (count, length), generator=torch.Generator().manual_seed(seed))


def randomized(model):
    """With gains and biases that matter."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def inputs(hidden=12, rows=200, outputs=(5, 9), seed=0):
    """Sites whose inputs vary in few directions, none of them an axis."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator)).Q
    scales = 0.5 ** torch.arange(hidden)
    found = []
    for width in outputs:
        felt = torch.randn(50, hidden, generator=generator) * scales @ axes.t()
        read = torch.randn(rows, hidden, generator=generator) * scales @ axes.t()
        found.append(StreamInputs(read, felt.t() @ felt / 50, width))
    return found


def test_the_cost_is_what_masks_drop_and_what_the_others_pay():
    (site, _), price, rows = inputs(), 1e-3, slice(7)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(3))).Q
    expected = 0.0
    for x in site.rows[rows].double():
        for i in range(12):
            q = rotation[:, i].double()
            cost = float(q @ site.moment.double() @ q * (x @ q) ** 2)
            expected += min(cost, price * site.outputs) / 7
    assert float(masked_cost(site, rotation, price, rows)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_at_its_price_masks_drop_the_share_that_is_asked_for(sparsity):
    sites, rotation = inputs(), torch.eye(12)
    price = price_for(sites, rotation, sparsity, rows=200)
    dropped = sum(
        site.outputs * float((site.entry_costs(rotation, slice(None)) <= price * site.outputs).float().mean())
        for site in sites
    )
    assert dropped / 14 == pytest.approx(sparsity, abs=0.01)


@pytest.mark.parametrize("first", ["a text of their own", "a place in every window"])
def test_the_price_is_that_of_all_rows_not_of_those_that_come_first(first):
    rows = torch.randn(16_384, 8, generator=torch.Generator().manual_seed(0))
    rows[slice(512) if first == "a text of their own" else slice(None, None, 64)] *= 1e-3
    site = [StreamInputs(rows, torch.eye(8), 4)]
    every = price_for(site, torch.eye(8), 0.5, rows=len(rows))
    assert price_for(site, torch.eye(8), 0.5) == pytest.approx(every, rel=0.2)


def test_the_search_finds_the_axes_and_is_reproducible():
    sites = inputs()
    found = find_rotation(sites, 0.5, steps=600)
    torch.testing.assert_close(found.t() @ found, torch.eye(12), rtol=0, atol=1e-5)
    assert torch.equal(found, find_rotation(sites, 0.5, steps=600))
    assert not torch.equal(found, find_rotation(sites, 0.5, steps=600, seed=1))
    nothing, turned = dropped_cost(sites, torch.eye(12), 0.5), dropped_cost(sites, found, 0.5)
    assert turned < 0.3 * nothing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 0.0}, "sparsity: got 0.0, expected more than 0"),
        ({"sparsity": 1.0}, "sparsity: got 1.0"),
        ({"steps": 0}, "steps: got 0, expected a positive number"),
        ({"sites": []}, "sites: got 0"),
    ],
    ids=["none", "all", "steps", "sites"],
)
def test_the_search_refuses(changes, message):
    with pytest.raises(SponError, match=message):
        find_rotation(**{"sites": inputs(), "sparsity": 0.5, **changes})


def test_samples_are_the_inputs_and_the_moments_of_all_linears(tiny_llama, monkeypatch):
    monkeypatch.setattr("spon_plugin.rotation.sample.is_native", lambda *_: False)  # in float32, to compare
    (site,) = [site for site in find_sites(tiny_llama) if site.name == "model.layers.1.mlp_in"]
    windows = ids(2, 9)
    (found,) = sample_inputs(tiny_llama, [site], windows, rows=1000)
    assert found.rows.shape == (16, 48) and found.outputs == 192
    seen = []
    handle = tiny_llama.get_submodule(site.modules[0]).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    tiny_llama(input_ids=windows)
    handle.remove()
    torch.testing.assert_close(found.rows, seen[0][:, 1:].flatten(0, 1))
    # The diagonal is the Fisher information that sensitivity sees, summed over gate and up.
    from spon_plugin.calibration.sensitivity import collect_fisher

    fisher = collect_fisher(tiny_llama, [site], windows).counted
    torch.testing.assert_close(found.moment.diagonal(), sum(fisher[path] for path in site.modules))


@pytest.mark.parametrize("kind", ROTATED)
def test_a_rotated_model_says_what_it_said_and_masks_cost_it_less(kind, tmp_path):
    model = randomized(ROTATED[kind]())
    tokens = ids(2, 12, seed=5)
    before = model(input_ids=tokens).logits
    found = rotate_model(model, ids(), ids(), 0.5, steps=60)  # of random models, nothing carries over to other ids
    torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    assert found.sites == 4 and found.after < 0.9 * found.before
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_turned_is_refused_before_the_search(kind):
    with pytest.raises(SponError, match=r"expected a decoder with .*Models of Llama's kind"):
        rotate_model(randomized(REFUSED[kind]()), ids(), ids(2), 0.5, steps=10**9)


def test_a_rotated_model_keeps_its_dtype_and_a_quantized_one_is_refused(tiny_llama):
    model = tiny_llama.to(torch.bfloat16)
    before = model(input_ids=ids(1, 8)).logits.float()
    rotate_model(model, ids(), ids(2, seed=3), 0.5, steps=2)
    assert model.dtype == torch.bfloat16
    after = model(input_ids=ids(1, 8)).logits.float()
    assert (after - before).abs().max() < 0.05 * before.abs().max()
    model.is_quantized = True
    with pytest.raises(SponError, match="model: got 'a quantized model'"):
        rotate_model(model, ids(), ids(2, seed=3), 0.5)
