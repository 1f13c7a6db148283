# SPDX-License-Identifier: Apache-2.0
"""However a model is called, a sequence has the logits it has alone; or a refusal says what is not known."""

import functools

import call_styles
import pytest
import torch
from call_styles import ARCHITECTURES, STYLES, alone, random_model
from peft import get_peft_model
from transformers import StaticCache

from spon_peft import SponConfig
from spon_plugin import SponError
from spon_plugin.decoder.positions import read_as
from spon_plugin.decoder.sites import find_sites, target_names

ADAPTERS = [(0, "peft"), (0, "merged"), (1, "merged"), (2, "peft")]
HOSTS = ["peft", "merged"]
CLOSE = dict(rtol=1e-6, atol=1e-6)  # float64: the same mask or another one, nothing between


@functools.cache
def dense(kind):
    return random_model(kind, seed=len(kind))


def sparse(kind, host, **config):
    base = random_model(kind, seed=len(kind))
    targets = target_names(find_sites(base), base)
    torch.manual_seed(7)
    model = get_peft_model(base, SponConfig(init_weights=False, target_modules=targets, **config)).eval()
    return model.merge_and_unload() if host == "merged" else model.get_base_model()


def sequences(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randperm(5, generator=generator)[:count] + 4  # 4 to 8, no two alike
    return [torch.randint(1, 48, (1, int(n)), generator=generator) for n in lengths]


def differs(found, expected):
    return any(a.shape != b.shape or not torch.allclose(a, b, **CLOSE) for a, b in zip(found, expected, strict=True))


@functools.cache
@torch.no_grad()
def styles_of(kind, seed):
    """The styles in which the dense model gives each sequence what it has alone (learned positions see padding)."""
    texts, names = sequences(seed), []
    expected = alone(dense(kind), texts)
    for name, style in STYLES.items():
        try:
            found = style(dense(kind), texts)
        except (
            IndexError,
            ValueError,
        ):  # OPT makes positions of a mask, and can make none of a mask of four dimensions
            continue
        if found is not None and not differs(found, expected):
            names.append(name)
    return names


@pytest.mark.parametrize(("prefix", "host"), ADAPTERS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_every_style_gives_what_the_plain_call_gives(kind, prefix, host):
    seed = 10 * len(kind) + prefix
    texts, model = sequences(seed), sparse(kind, host, dense_prefix=prefix)
    expected = alone(model, texts)
    assert differs(expected, alone(dense(kind), texts))
    wrong = [name for name in styles_of(kind, seed) if differs(STYLES[name](model, texts), expected)]
    assert not wrong


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_most_styles_are_tried(kind):
    few = {"gpt2": 10, "opt": 12}  # without a sequence's own positions
    assert len(styles_of(kind, 0)) >= few.get(kind, 13)


@torch.no_grad()
def prompt_and_steps(model, ids, prompt, **more):
    """The definition of ``tokens: decode``: the prompt in one pass, then token by token."""
    return torch.cat([part[0] for part in call_styles._chunks(model, ids, size=1, first=prompt, **more)])


@pytest.mark.parametrize(("prefix", "host"), [(0, "merged"), (4, "peft")])
@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_prompts_are_dense_and_generated_tokens_sparse(kind, prefix, host):
    model, base = sparse(kind, host, tokens="decode", dense_prefix=prefix), dense(kind)
    ids, prompt = sequences(3, 1)[0], 2
    dynamic = call_styles.DynamicCache
    expected = prompt_and_steps(model, ids, prompt, cache=dynamic)
    own = prompt_and_steps(base, ids, prompt, cache=dynamic)
    assert torch.allclose(expected[: max(prompt, prefix)], own[: max(prompt, prefix)], **CLOSE)
    assert not torch.allclose(expected[max(prompt, prefix) :], own[max(prompt, prefix) :], **CLOSE)
    said = torch.arange(ids.shape[1])[None] < prompt
    with read_as(said):
        found = {"at once, as said": alone(model, [ids])[0], "backbone": call_styles.backbone(model, [ids])[0]}
    found["static cache"] = prompt_and_steps(model, ids, prompt, cache=StaticCache)
    steps = functools.partial(prompt_and_steps, model, ids, prompt, cache=dynamic)
    found["thread"], _ = call_styles.beside(model, steps, lambda: model(input_ids=ids[:, :3]))
    with read_as("generated"):
        found["continuation at once"] = torch.cat(
            [part[0] for part in call_styles._chunks(model, ids, dynamic, size=99, first=prompt)]
        )
    assert [name for name, out in found.items() if not torch.allclose(out, expected, **CLOSE)] == []
    with read_as("prompt"):
        whole = call_styles.in_chunks(model, [ids], size=2)[0]
    last = ids.shape[1] // 2 * 2  # a single token that follows counts as generated
    assert torch.allclose(whole[:last], own[:last], **CLOSE)


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_what_is_not_known_is_refused(host):
    model, ids = sparse("llama", host, tokens="decode"), sequences(4, 1)[0]
    with pytest.raises(SponError, match="decode, and 2 tokens that go on from a cache at once.*read_as"):
        call_styles.in_chunks(model, [ids], size=2)
    with pytest.raises(SponError, match="tokens without a cache.*read_as"):
        model(input_ids=ids, use_cache=False)
    with pytest.raises(SponError, match="read_as.*shape"), read_as(torch.ones(1, 2, dtype=torch.bool)):
        model(input_ids=ids)
    model = sparse("llama", host, dense_prefix=1)
    with pytest.raises(SponError, match="outside of its decoder block"):
        model.model.layers[0].mlp(torch.ones(1, 3, 16).double())
    with pytest.raises(SponError, match="position_ids None"):
        model.model.layers[0](torch.ones(1, 3, 16).double(), position_embeddings=(torch.ones(1, 3, 8),) * 2)


@pytest.mark.parametrize(("prefix", "host"), [(0, "peft"), (0, "merged"), (1, "merged")])
@torch.no_grad()
def test_compiling_breaks_no_graph(prefix, host):
    model, ids = sparse("llama", host, dense_prefix=prefix), sequences(6, 1)[0]
    expected = model(input_ids=ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(input_ids=ids, use_cache=False).logits, expected, **CLOSE)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("config", [{"dense_prefix": 0}, {"dense_prefix": 2}, {"tokens": "decode"}], ids=str)
def test_checkpointing_recomputes_what_was_computed(config, reentrant, host):
    ids, other = sequences(5, 2)
    prompt = torch.arange(ids.shape[1])[None] < 3

    def gradient(checkpointing):
        model = sparse("llama", host, **config).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        with read_as(prompt):
            policy = model(inputs_embeds=embedded, use_cache=False).logits.log_softmax(-1)[..., 0].sum()
        with torch.no_grad(), read_as("generated"):  # a pass between the two, of other tokens read otherwise
            model(input_ids=other, use_cache=False)
            with read_as(~prompt):
                policy.backward()
        return embedded.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-9, atol=1e-9)
