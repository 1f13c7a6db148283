# SPDX-License-Identifier: Apache-2.0
"""Blocks that compute single tokens as programs give what transformers' own give, and step aside for all else."""

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, StaticCache

from spon_plugin.kernels.cpu.kernel import is_available
from spon_plugin.layers import block_program
from spon_plugin.layers.sparse_linear import SparseLayer, share_calls
from spon_plugin.layers.sparse_quantized import sparse_layer
from spon_transformers.quantize import Rounding, quantize
from spon_transformers.quick_blocks import QuickBlock, quicken

pytestmark = pytest.mark.skipif(not is_available(), reason="needs Numba and GNU's OpenMP")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
MODELS = {
    "Llama": {},
    "Llama with biases": {"attention_bias": True, "mlp_bias": True},
    "Llama with heads of another size": {"head_dim": 24},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
}
WEIGHTS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8": (torch.float32, 8),
    "int4": (torch.float32, 4),
    "int8 in bfloat16": (torch.bfloat16, 8),
}


@torch.no_grad()
def make(kind="Llama", weights="float32", threshold=0.3, per_channel=False, center=False, differ=False):
    """A sparse model, whose blocks are transformers' own."""
    torch.manual_seed(0)
    name, (dtype, bits) = kind.split()[0], WEIGHTS[weights]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS[kind]}, attn_implementation="sdpa")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    if bits:
        quantize(model, Rounding(bits, 32 if bits == 4 else None))
    model.to(dtype)
    for path, linear in [(p, m) for p, m in model.named_modules() if p.endswith(LINEARS)]:
        layer = sparse_layer(linear, path)
        shift = LINEARS.index(path.rpartition(".")[2]) / 100 if differ else 0.0
        layer.spon_threshold = torch.full((layer.in_features if per_channel else 1,), threshold + shift)
        if per_channel:
            layer.spon_threshold += 0.1 * torch.rand(layer.in_features, generator=torch.Generator().manual_seed(1))
        layer.spon_center = torch.full((layer.in_features,), 0.05) if center else None
        layer.arrange_for_kernels()
        if hasattr(layer, "exact"):
            layer.exact = True
        model.set_submodule(path, layer)
    share_calls(model)
    return model


def quick(model):
    made = copy.deepcopy(model)
    quicken(made)
    return made


@pytest.fixture
def runs(monkeypatch):
    """How many blocks each run of a program had."""
    sizes = []
    original = block_program.run_blocks

    def counted(programs, *arguments):
        sizes.append(len(programs))
        return original(programs, *arguments)

    monkeypatch.setattr("spon_transformers.quick_blocks.run_blocks", counted)
    return sizes


@torch.no_grad()
def decode(model, steps=5, prompt=9, watch=None):
    """The logits of a prompt and of some tokens after it, which are the same for every model."""
    ids = torch.randint(64, (1, prompt + steps), generator=torch.Generator().manual_seed(2))
    cache = DynamicCache(config=model.config)
    found = [model(ids[:, :prompt], past_key_values=cache).logits[:, -1]]
    for step in range(steps):
        if watch is not None:
            watch(model, cache, step)
        found.append(model(ids[:, prompt + step : prompt + step + 1], past_key_values=cache).logits[:, -1])
    return torch.cat(found), cache


def close(found, expected, dtype=torch.float32):
    """Every element in float32, all of them together in bfloat16."""
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))
    else:
        assert float((found - expected).float().norm() / expected.float().norm()) < 0.03


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", MODELS)
def test_logits_and_cache_are_those_of_transformers_blocks(kind, weights, runs):
    dtype = WEIGHTS[weights][0]
    # Roundings of bfloat16 move inputs over a threshold, which moves the outputs by more than roundings do.
    model = make(kind, weights, threshold=0.3 if dtype == torch.float32 else 1e-9)
    (expected, plain), (found, cache) = decode(model), decode(quick(model))
    close(found, expected, dtype)
    for own, other in zip(plain.layers, cache.layers, strict=True):
        close(other.keys, own.keys, dtype)
        close(other.values, own.values, dtype)
    # Each by itself at first, then all of them at once.
    assert runs == [1, 1, 1, 3, 3, 3, 3]


MASKS = {
    "next to nothing masked": {"threshold": 1e-9},
    "all masked": {"threshold": 1e9},
    "per channel": {"per_channel": True},
    "centres": {"center": True, "per_channel": True},
    "another mask for each linear": {"differ": True},
}


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_masks(masks, weights, runs):
    model = make(weights=weights, **masks)
    close(decode(quick(model))[0], decode(model)[0])
    assert runs[-1] == 3


def test_text_is_the_same_and_longer_than_the_first_room(runs, monkeypatch):
    monkeypatch.setattr("spon_transformers.growing_cache._ROOM", 7)
    model = make()
    ids = torch.randint(64, (1, 4))
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(quick(model).generate(ids, **settings), model.generate(ids, **settings))
    assert runs.count(3) > 30


def crop(model, cache, step):
    if step == 3:
        cache.crop(-2)


def hook(model, cache, step):
    if step == 2:
        model.model.layers[1].mlp.act_fn.register_forward_hook(lambda _m, _a, y: 2 * y)


def hook_on_a_block(model, cache, step):
    if step == 2:
        model.model.layers[0].register_forward_hook(lambda _m, _a, y: y + 1)


def write_to_a_block(model, cache, step):
    if step == 2:
        model.model.layers[0].register_forward_hook(lambda _m, _a, y: y.add_(1))


def weight(model, cache, step):
    if step == 2:
        model.model.layers[1].self_attn.o_proj.weight.mul_(2)


def norm(model, cache, step):
    if step == 2:
        model.model.layers[2].post_attention_layernorm.weight = nn.Parameter(
            torch.full((64,), 0.7), requires_grad=False
        )


def threshold(model, cache, step):
    if step == 2:
        model.model.layers[0].mlp.up_proj.spon_threshold.fill_(0.9)


def threads(model, cache, step):
    if step == 2:
        torch.set_num_threads(torch.get_num_threads() + 1)


def forward(model, cache, step):
    if step == 2:
        attention = model.model.layers[1].self_attn
        own = attention.forward
        attention.forward = lambda *arguments, **named: (3 * own(*arguments, **named)[0], None)


def layer(model, cache, step):
    if step == 2:
        model.model.layers[1].mlp = copy.deepcopy(model.model.layers[0].mlp)


def order(model, cache, step):
    if step == 2:
        model.model.layers = nn.ModuleList([model.model.layers[i] for i in (1, 0, 2)])


def cache_of_its_own(model, cache, step):
    if step == 2:
        cache.layers[1] = copy.deepcopy(cache.layers[1])


WATCHES = [
    crop, hook, hook_on_a_block, write_to_a_block, weight, norm, threshold, threads, forward, layer, order,
    cache_of_its_own,
]  # fmt: skip


@pytest.mark.parametrize("watch", WATCHES, ids=lambda f: f.__name__)
def test_what_happens_between_tokens_is_seen(watch, runs):
    model, before = make(), torch.get_num_threads()
    made = quick(model)
    try:
        expected, _ = decode(copy.deepcopy(model), watch=watch)
        torch.set_num_threads(before)
        found, _ = decode(made, watch=watch)
    finally:
        torch.set_num_threads(before)
    close(found, expected)
    assert max(runs) == 3


def test_a_hook_sees_every_layer_run(runs):
    model, seen = quick(make()), []
    decode(model)
    runs.clear()
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            module.register_forward_hook(lambda *_args, name=name: seen.append(name))
    decode(model, steps=1, prompt=2)
    assert len(seen) == 2 * 21 and not runs


STEPS = {
    "two tokens": ({"input_ids": torch.zeros(1, 2, dtype=torch.long)}, {}),
    "padding": (
        {"input_ids": torch.zeros(1, 1, dtype=torch.long), "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])},
        {},
    ),
    "eager attention": ({"input_ids": torch.zeros(1, 1, dtype=torch.long)}, {"attn_implementation": "eager"}),
}


@torch.no_grad()
@pytest.mark.parametrize("arguments, changes", STEPS.values(), ids=STEPS)
def test_other_steps_are_transformers_own(arguments, changes, runs):
    model = make()
    if changes:
        model.set_attn_implementation(changes["attn_implementation"])
    found = []
    for each in (model, quick(model)):
        cache = DynamicCache(config=each.config)
        each(torch.arange(4)[None], past_key_values=cache)
        found.append(each(**arguments, past_key_values=cache).logits)
    assert torch.equal(*found) and not runs


def test_gradients_are_transformers_own(runs):
    model, found = make(), []
    for each in (model, quick(model)):
        cache = DynamicCache(config=each.config)
        embedded = torch.ones(1, 1, 64, requires_grad=True)
        each(torch.arange(4)[None], past_key_values=cache)
        each(inputs_embeds=embedded, past_key_values=cache).logits.sum().backward()
        found.append(embedded.grad)
    assert torch.equal(*found) and not runs


def test_a_weight_that_is_trained_gets_its_gradient(runs):
    model, found = make(), []
    for each in (model, quick(model)):
        cache = DynamicCache(config=each.config)
        norm = each.model.layers[0].input_layernorm.weight.requires_grad_()
        with torch.no_grad():
            each(torch.arange(4)[None], past_key_values=cache)
        each(torch.ones(1, 1, dtype=torch.long), past_key_values=cache).logits.sum().backward()
        found.append(norm.grad)
    assert torch.equal(*found) and not runs


def test_an_attention_function_of_ones_own_is_called(runs):
    def attention(module, query, key, value, mask, **_options):
        return query.transpose(1, 2) * 0.5, None

    transformers.AttentionInterface.register("halved", attention)
    model = make()
    model.set_attn_implementation("halved")
    close(decode(quick(model))[0], decode(model)[0])
    assert not runs


def test_a_centre_that_is_taken_away_is_seen(runs):
    def watch(model, cache, step):
        if step == 2:
            model.model.layers[1].mlp.down_proj.spon_center = None

    model = make(center=True)
    close(decode(quick(model), watch=watch)[0], decode(copy.deepcopy(model), watch=watch)[0])
    assert max(runs) == 3


def test_blocks_that_are_called_twice_in_a_token(runs):
    model = make()
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in (0, 1, 0, 1)])
    model.config.num_hidden_layers = 4
    close(decode(quick(model))[0], decode(model)[0])
    assert max(runs) == 2


@torch.no_grad()
def test_a_static_cache_is_transformers_own(runs):
    model, found = make(), []
    for each in (model, quick(model)):
        cache = StaticCache(config=each.config, max_cache_len=16)
        each(torch.arange(4)[None], past_key_values=cache)
        found.append(each(torch.ones(1, 1, dtype=torch.long), past_key_values=cache).logits)
    assert torch.equal(*found) and not runs


def test_inference_mode(runs):
    model = make()
    made = quick(model)
    with torch.inference_mode():
        close(decode(made)[0], decode(model)[0])
    assert runs[-1] == 3


def test_tensors_made_in_inference_mode_are_left_to_transformers(runs):
    with torch.inference_mode():  # torch counts no writes to them
        model = make()
        close(decode(quick(model))[0], decode(model)[0])
    assert not runs


def test_without_a_threshold_layers_stay_torchs_own(runs):
    model = make(threshold=0.0)
    assert torch.equal(decode(quick(model))[0], decode(model)[0]) and not runs


def test_another_thread_of_python_computes_by_itself(runs):
    model = quick(make())
    expected, _ = decode(model)
    with block_program._lock:
        found, _ = decode(model)
    close(found, expected)


def test_threads_of_python_that_share_a_model_keep_their_texts_apart():
    # Which of them computes a block by itself is chance, and so are last bits: no input may lie at its threshold.
    model = quick(make(threshold=1e-9))
    prompts = [torch.randint(64, (1, 4), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    expected = [model.generate(ids, **settings) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: model.generate(ids, **settings), 5 * prompts))
    assert all(torch.equal(one, other) for one, other in zip(found, 5 * expected, strict=True))


def test_dropout_while_training_is_transformers_own(runs):
    model = quick(make())
    model.train()
    decode(model)
    assert not runs


def test_copies_and_pickles_are_quick_and_independent(runs):
    model = quick(make())
    expected, _ = decode(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(isinstance(block, QuickBlock) for block in other.model.layers)
        runs.clear()
        found, _ = decode(other)
        assert torch.equal(found, expected) and runs[-1] == 3
        with torch.no_grad():
            other.model.layers[0].mlp.down_proj.weight.zero_()
    assert torch.equal(decode(model)[0], expected)


def test_blocks_keep_names_and_signatures():
    model = make()
    plain, block = model.model.layers[0], quick(model).model.layers[0]
    assert type(block).__name__ == type(plain).__name__ and isinstance(block, type(plain))
    assert inspect.signature(block.forward) == inspect.signature(plain.forward)
    assert repr(block) == repr(plain) and list(block.state_dict()) == list(plain.state_dict())


def test_hidden_states_are_recorded(runs):
    model = make()
    made, found = quick(model), []
    decode(made)
    for each in (model, made):
        cache = DynamicCache(config=each.config)
        with torch.no_grad():
            each(torch.arange(4)[None], past_key_values=cache)
            found.append(each(torch.ones(1, 1, dtype=torch.long), past_key_values=cache, output_hidden_states=True))
    for one, other in zip(found[0].hidden_states, found[1].hidden_states, strict=True):
        close(other, one)
    # Hooks for what was recorded stay in the model.
    assert made.model.layers[0].self_attn._forward_hooks
    runs.clear()
    close(decode(made)[0], decode(model)[0])
    assert max(runs) == 3


def test_a_layer_that_is_not_sparse_leaves_its_block_to_transformers(runs):
    model = make()
    model.model.layers[1].mlp.gate_proj = nn.Linear(64, 160, bias=False).requires_grad_(False)
    close(decode(quick(model))[0], decode(model)[0])
    assert set(runs) == {1}


def test_another_activation_is_left_to_transformers(runs):
    model = make()
    for block in model.model.layers:
        block.mlp.act_fn = nn.GELU()
    close(decode(quick(model))[0], decode(model)[0])
    assert not runs


def test_other_kinds_of_blocks_stay_as_they_are():
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model = transformers.GPT2LMHeadModel(config)
    quicken(model)
    assert not any(isinstance(module, QuickBlock) for module in model.modules())


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_says_the_same_token_by_token_and_at_once(smollm2, smollm2_dir, runs):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    text = "The river rises in the mountains and reaches the sea near an old harbour, where ships once lay. "
    ids = tokenizer(5 * text, return_tensors="pt").input_ids[:, :80]
    quantize(smollm2, Rounding(8, None))
    for path, linear in [(p, m) for p, m in smollm2.named_modules() if p.endswith(LINEARS)]:
        layer = sparse_layer(linear, path)  # without a mask, in which roundings would be no roundings any more
        layer.arrange_for_kernels()
        smollm2.set_submodule(path, layer)
    quicken(smollm2)
    cache = DynamicCache(config=smollm2.config)
    logits = [smollm2(token, past_key_values=cache).logits for token in ids.split(1, 1)]
    close(torch.cat(logits, 1), smollm2(ids).logits)
    assert runs[:30] == [1] * 30 and set(runs[30:]) == {30}
