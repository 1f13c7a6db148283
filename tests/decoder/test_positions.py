# SPDX-License-Identifier: Apache-2.0
import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from spon_plugin import SponError
from spon_plugin.decoder.positions import current_call, read_as, whole_windows
from spon_plugin.decoder.tokens import DenseTokens, block_of

CACHE = object()
PAD_3 = torch.tensor([[0, 0, 0, 1, 1, 1]])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states, position_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        return self.linear(hidden_states)


class Model(nn.Module):
    def __init__(self, block=Block):
        super().__init__()
        self.layers = nn.ModuleList([block(), block()])
        self.head = nn.Linear(4, 4)


def rows(tokens, sequence, positions=None, batch=1, flat=False, said=None, **given):
    """What a linear inside a block is told in one call of the block."""
    model, seen = Model(), []
    tokens.attach(model, ["layers.1.linear"])
    model.layers[1].linear.register_forward_pre_hook(lambda _m, args: seen.append(tokens.rows(args[0])))
    hidden = torch.zeros((batch * sequence, 4) if flat else (batch, sequence, 4))
    positions = None if positions is None else torch.as_tensor(positions)
    with said or nullcontext():
        model.layers[1](hidden, positions, **given)
    assert current_call() is None
    return None if seen[0] is None else seen[0].int().tolist()


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def causal(padding):
    keys = padding.shape[1]
    return torch.ones(keys, keys).tril().bool() & padding[:, None, None].bool()


PREFIX = {
    "alone": (2, dict(sequence=4, positions=[[0, 1, 2, 3]]), [[1, 1, 0, 0]]),
    "one row of positions for a batch": (1, dict(sequence=3, positions=[[0, 1, 2]], batch=2), [[1, 0, 0]] * 2),
    "within the prefix, on a cache": (2, dict(sequence=2, positions=[[1, 2]]), [[1, 0]]),
    "past the prefix": (2, dict(sequence=2, positions=[[2, 3]]), None),
    "packed": (1, dict(sequence=5, positions=[[0, 1, 2, 0, 1]]), [[1, 0, 0, 1, 0]]),
    "left padding": (
        2,
        dict(sequence=6, positions=[list(range(6))], attention_mask=causal(PAD_3)),
        [[1, 1, 1, 1, 1, 0]],
    ),
    "left padding, additive": (
        1,
        dict(sequence=6, positions=[list(range(6))], attention_mask=additive(causal(PAD_3))),
        [[1, 1, 1, 1, 0, 0]],
    ),
    "left padding, flash": (
        1,
        dict(sequence=6, positions=[list(range(6))], attention_mask=PAD_3),
        [[1, 1, 1, 1, 0, 0]],
    ),
    "left padding, flash, on a cache": (
        3,
        dict(sequence=1, positions=[[5]], attention_mask=PAD_3),
        [[1]],
    ),
    "left padding, static cache": (
        3,
        dict(
            sequence=1, positions=[[5]], attention_mask=torch.tensor([0, 0, 0, 1, 1, 1, 0, 0]).bool()[None, None, None]
        ),
        [[1]],
    ),
    "both at once": (1, dict(sequence=3, positions=[[0, 1, 2]], attention_mask=torch.ones(1, 3)), [[1, 0, 0]]),
}


@pytest.mark.parametrize(("count", "given", "expected"), PREFIX.values(), ids=PREFIX)
def test_the_first_positions_are_dense(count, given, expected):
    assert rows(DenseTokens(count), **given) == expected


def test_masks_of_flex_attention():
    def visible(_b, _h, query, key):
        return (query >= key) & (key >= 3)

    mask = create_block_mask(visible, 1, 1, 6, 6, device="cpu")
    given = dict(sequence=6, positions=[list(range(6))], attention_mask=mask)
    assert rows(DenseTokens(1), **given) == [[1, 1, 1, 1, 0, 0]]


DECODE = {
    "a prompt": (dict(sequence=3, positions=[[0, 1, 2]], past_key_values=CACHE), [[1, 1, 1]]),
    "a first token": (dict(sequence=1, positions=[[0]]), [[1]]),
    "a generated token": (dict(sequence=1, positions=[[7]], past_key_values=CACHE), None),
    "a batch of both": (dict(sequence=1, positions=[[7], [0]], batch=2, past_key_values=CACHE), [[0], [1]]),
    "padding": (dict(sequence=5, positions=[[0, 0, 0, 1, 2]], past_key_values=CACHE), [[1] * 5]),
    "padding of ones": (dict(sequence=5, positions=[[1, 1, 0, 1, 2]], past_key_values=CACHE), [[0, 0, 1, 1, 1]]),
    "requests in one row": (dict(sequence=5, positions=[[0, 1, 2, 9, 4]], past_key_values=CACHE), [[1, 1, 1, 0, 0]]),
    "requests that seem one": (
        dict(sequence=4, positions=[[0, 1, 2, 3]], past_key_values=CACHE, cu_seq_lens_q=torch.tensor([0, 3, 4, 4])),
        [[1, 1, 1, 0]],
    ),
    "a chunk, said": (dict(sequence=2, positions=[[4, 5]], past_key_values=CACHE, said=read_as("prompt")), [[1, 1]]),
    "a continuation, said": (dict(sequence=2, positions=[[4, 5]], said=read_as("generated")), None),
    "token by token, said": (
        dict(sequence=2, positions=[[4, 5]], said=read_as(torch.tensor([[True, False]]))),
        [[1, 0]],
    ),
    "a window": (dict(sequence=2, said=whole_windows()), [[1, 1]]),
}


@pytest.mark.parametrize(("given", "expected"), DECODE.values(), ids=DECODE)
def test_prompts_are_dense(given, expected):
    assert rows(DenseTokens(0, "decode"), **given) == expected


def test_a_prefix_that_is_longer_than_the_prompt():
    given = dict(sequence=1, positions=[[1], [5]], batch=2, past_key_values=CACHE)
    assert rows(DenseTokens(3, "decode"), **given) == [[1], [0]]


def test_windows_need_no_positions_of_the_model():
    with whole_windows():
        assert rows(DenseTokens(2), sequence=3, batch=2) == [[1, 1, 0]] * 2


def test_rows_take_the_shape_of_the_input():
    model, tokens, seen = Model(), DenseTokens(1), []
    tokens.attach(model, ["layers.0.linear"])

    def flattened(_module, args):  # as OPT does
        seen.append(tokens.rows(args[0].reshape(-1, 4)))

    model.layers[0].linear.register_forward_pre_hook(flattened)
    model.layers[0](torch.zeros(2, 3, 4), torch.arange(3)[None])
    assert seen[0].int().tolist() == [1, 0, 0, 1, 0, 0]


REFUSED = {
    "no positions": (DenseTokens(1), dict(sequence=3), r"dense_prefix in layers.1: got 'position_ids None'"),
    "positions of three axes": (DenseTokens(1), dict(sequence=3, positions=torch.zeros(3, 1, 3)), r"\(3, 1, 3\)"),
    "positions of another pass": (DenseTokens(1), dict(sequence=3, positions=[[0, 1]]), r"expected \(1, 3\)"),
    "another sequence": (
        DenseTokens(1),
        dict(sequence=3, positions=[[0, 1, 2]], encoder_hidden_states=torch.zeros(1, 3, 4)),
        "a call with encoder_hidden_states",
    ),
    "a mask of its own kind": (
        DenseTokens(1),
        dict(sequence=3, positions=[[0, 1, 2]], attention_mask={"full": None}),
        "an attention mask dict",
    ),
    "several tokens on a cache": (
        DenseTokens(0, "decode"),
        dict(sequence=3, positions=[[4, 5, 6]], past_key_values=CACHE),
        "3 tokens that go on from a cache.*read_as",
    ),
    "no cache": (
        DenseTokens(0, "decode"),
        dict(sequence=3, positions=[[0, 1, 2]]),
        "3 tokens without a cache.*read_as",
    ),
}


@pytest.mark.parametrize(("tokens", "given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_told_is_refused(tokens, given, message):
    with pytest.raises(SponError, match=message):
        rows(tokens, **given)
    assert current_call() is None


def test_a_prefix_as_wide_as_the_attention_is_refused_where_padding_may_be():
    model, tokens, seen = Model(), DenseTokens(3), []
    model.config = type("Config", (), {"sliding_window": 3})()
    tokens.attach(model, ["layers.0.linear"])
    model.layers[0].linear.register_forward_pre_hook(lambda _m, args: seen.append(tokens.rows(args[0])))
    model.layers[0](torch.zeros(1, 6, 4), torch.arange(6)[None])
    assert seen[0].int().tolist() == [[1, 1, 1, 0, 0, 0]]
    with pytest.raises(SponError, match="dense_prefix in layers.0: got 3, expected less than 3, what the attention"):
        model.layers[0](torch.zeros(1, 6, 4), torch.arange(6)[None], causal(PAD_3))


def test_a_linear_that_is_not_in_a_followed_call_is_refused():
    model, tokens = Model(), DenseTokens(1)
    tokens.attach(model, ["layers.0.linear"])
    with pytest.raises(SponError, match="dense_prefix: .*outside of its decoder block"):
        tokens.rows(torch.zeros(2, 3, 4))
    model.layers[0].linear.register_forward_pre_hook(lambda _m, args: tokens.rows(args[0][:, :2]))
    with pytest.raises(SponError, match=r"tokens \(1, 2\).*the block, \(1, 3\)"):
        model.layers[0](torch.zeros(1, 3, 4), torch.arange(3)[None])


def test_masks_of_the_input_alone_ask_nobody():
    model, tokens = Model(), DenseTokens(0)
    assert not tokens.leaves_any and tokens.rows(torch.zeros(2, 3, 4)) is None
    tokens.check(model, ["head"])


class Blind(Block):
    def forward(self, hidden_states, attention_mask=None):
        return self.linear(hidden_states)


CHECKED = {
    "outside": (Model(), "head", {}, "dense_prefix 1: head: got 'a linear outside of any block'"),
    "blind": (Model(Blind), "layers.0.linear", {}, "dense_prefix 1: layers.0.linear: got 'a linear in Blind'"),
    "narrow": (Model(), "layers.0.linear", {"sliding_window": 1}, "less than 1, what the attention sees"),
    "chunks": (Model(), "layers.0.linear", {"attention_chunk_size": 8}, "less than 1, what the attention sees"),
}


@pytest.mark.parametrize(("model", "path", "config", "message"), CHECKED.values(), ids=CHECKED)
def test_models_that_cannot_tell_are_refused_before_work(model, path, config, message):
    model = copy.deepcopy(model)
    model.config = type("Config", (), config)()
    with pytest.raises(SponError, match=message):
        DenseTokens(1).check(model, [path])
    DenseTokens(0).check(model, [path])


def test_the_outermost_list_holds_the_blocks():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})])})
    assert block_of(model, "layers.0.experts.0") == "layers.0"
    assert block_of(nn.Sequential(nn.Linear(2, 2)), "0") is None


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_hooks_are_copied_with_the_model_and_removed(copier):
    model, tokens = Model(), DenseTokens(1)
    attachment = tokens.attach(model, ["layers.0.linear", "layers.1.linear"])
    copied = copier(model)
    attachment.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    seen = []
    copied.layers[0].linear.register_forward_pre_hook(lambda _m, args: seen.append(tokens.rows(args[0])))
    copied.layers[0](torch.zeros(1, 3, 4), torch.arange(3)[None])
    assert seen[0].int().tolist() == [[1, 0, 0]] and current_call() is None


def test_a_failing_block_leaves_nothing_behind():
    model = Model()
    DenseTokens(1).attach(model, ["layers.0.linear"])
    DenseTokens(2).attach(model, ["layers.0.linear"])
    with pytest.raises(RuntimeError):
        model.layers[0](torch.zeros(1, 3, 5), torch.arange(3)[None])
    assert current_call() is None


@pytest.mark.parametrize("tokens", [DenseTokens(1), DenseTokens(0, "decode")], ids=["prefix", "decode"])
def test_compiled_blocks_are_told(tokens):
    class Asks(Block):
        def forward(self, hidden_states, position_ids=None, past_key_values=None):
            dense = tokens.rows(hidden_states)
            return hidden_states if dense is None else torch.where(dense[..., None], 2.0, hidden_states)

    model = Model(Asks)
    tokens.attach(model, ["layers.0.linear", "layers.1.linear"])
    compiled = torch.compile(model.layers[0], backend="eager", fullgraph=tokens.tokens == "all")
    for start in (0, 5):
        given = torch.zeros(1, 1, 4), torch.tensor([[start]])
        assert torch.equal(compiled(*given), model.layers[0](*given))
