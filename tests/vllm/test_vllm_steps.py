# SPDX-License-Identifier: Apache-2.0
"""What an operator makes of the step it runs in: which steps are sparse, what padding does, and what is counted."""

from types import SimpleNamespace

import pytest
import torch
from layers import step
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import CUDAGraphMode

from spon_vllm import metrics, ops, steps

IN, OUT = 48, 24
NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """No speculation; what a test sets is taken back."""
    for name, value in (("_speculates", False), ("_splits_context", False), ("_graph_sizes", None)):
        monkeypatch.setattr(steps, name, value)


@pytest.fixture
def counters(monkeypatch):
    own = metrics.Counters()
    monkeypatch.setattr(metrics, "COUNTERS", own)
    monkeypatch.delenv(metrics.DIRECTORY_VARIABLE, raising=False)
    return own


def rows(count):
    return torch.zeros(count, IN)


def test_steps_of_requests_that_decode_are_sparse_up_to_the_limit():
    for tokens in (1, 2, 4):
        with step(tokens):
            assert ops.runs_sparse(rows(tokens), 4)
    with step(5):
        assert not ops.runs_sparse(rows(5), 4)
        assert ops.runs_sparse(rows(5), -1)


@pytest.mark.parametrize("speculates", [True, False], ids=["speculating", "not speculating"])
def test_prompts_and_verified_drafts_are_dense_however_short(speculates, monkeypatch):
    monkeypatch.setattr(steps, "_speculates", speculates)
    with step(4, longest=4):
        assert not ops.runs_sparse(rows(4), 4)
        assert ops.runs_sparse(rows(4), -1)  # mode `all` is one function of every step
    with step(4, longest=1):
        assert ops.runs_sparse(rows(4), 4)


def test_flashinfer_says_it_in_other_words():
    for decodes, prefills, sparse in ((4, 0, True), (1, 0, False), (3, 1, False)):
        said = dict(num_prefills=prefills, num_decodes=decodes, num_decode_tokens=4 - prefills, num_actual_tokens=4)
        with step(4, attn_metadata={"l": SimpleNamespace(**said)}):
            assert ops.runs_sparse(rows(4), 4) is sparse


@pytest.mark.parametrize(
    ("mode", "longest", "requests", "speculates", "sparse"),
    [
        pytest.param(PIECEWISE, None, None, False, True, id="piecewise"),
        pytest.param(PIECEWISE, 1, None, True, False, id="piecewise, speculating: may verify"),
        pytest.param(FULL, 1, 4, True, True, id="whole, one token each"),
        pytest.param(FULL, 4, 1, True, False, id="whole, verifies"),
        pytest.param(FULL, 2, 2, False, False, id="whole, two each"),
        pytest.param(FULL, 4, None, False, True, id="whole, any kind of step"),
        pytest.param(FULL, 4, None, True, False, id="whole, any kind, speculating"),
    ],
)
def test_what_a_captured_graph_replays(mode, longest, requests, speculates, sparse, monkeypatch):
    monkeypatch.setattr(steps, "_speculates", speculates)
    with step(4, longest=longest, mode=mode, requests=requests):
        assert ops.runs_sparse(rows(4), 4) is sparse


def test_the_limit_of_graphs_is_a_size_that_is_captured(monkeypatch):
    assert steps.served_limit(3) == 3
    monkeypatch.setattr(steps, "_graph_sizes", (1, 2, 4, 8))
    assert [steps.served_limit(limit) for limit in (1, 2, 3, 5)] == [1, 2, 2, 4]
    monkeypatch.setattr(steps, "_graph_sizes", (4, 8))
    assert steps.served_limit(3) == 0


def layer():
    generator = torch.Generator().manual_seed(0)
    weight_t = torch.randn(IN, OUT, generator=generator)
    return weight_t, torch.tensor([1.0]), torch.randn(OUT, generator=generator)


@pytest.mark.parametrize("garbage", [torch.nan, 100.0], ids=["NaN", "large"])
@pytest.mark.parametrize(
    "where", ["is_padding", "slot_mapping"], ids=["a mask of padding", "no slot in the cache (before vLLM 0.26)"]
)
def test_padding_reads_no_weight(garbage, where):
    """The weights that no token keeps are NaN: whoever multiplies them says so."""
    weight_t, threshold, bias = layer()
    x = torch.zeros(4, IN)
    x[0, 3], x[1, 5] = 2.0, -3.0
    x[2:] = garbage
    poisoned = torch.full_like(weight_t, torch.nan)
    poisoned[3], poisoned[5] = weight_t[3], weight_t[5]
    slots = {"l": torch.tensor([7, 8, -1, -1])}
    more = {} if where == "is_padding" else {"is_padding": None, "slot_mapping": slots}
    with step(4, 2, **more):
        y = ops.linear(x, poisoned.t(), threshold, bias, None, None, -1)
    torch.testing.assert_close(y[:2], torch.stack([2 * weight_t[3], -3 * weight_t[5]]) + bias)
    assert torch.equal(y[2:], bias.expand(2, -1))


def test_a_capture_in_no_mode_looks_for_padding(monkeypatch):
    """vLLM's second runner captures whole steps in mode NONE, full of tokens; replays may have padding."""
    with step(4, 4, is_padding=(mask := torch.tensor([False, False, True, True]))):
        assert steps.padding(4) is None
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert steps.padding(4) is mask and int(steps.real_tokens(4)) == 2


def test_padding_below_a_centre_is_zeroed_too():
    weight_t, threshold, bias = layer()
    center = torch.full((IN,), 5.0)
    x = torch.full((3, IN), 5.0)
    x[2] = 0.0
    with step(3, 2):
        y = ops.linear(x, torch.full_like(weight_t, torch.nan).t(), threshold, bias, None, None, -1, center)
    assert torch.equal(y, bias.expand(3, -1))


def test_tokens_of_other_ranks_are_no_padding(monkeypatch):
    monkeypatch.setattr(steps, "_splits_context", True)
    with step(2, 1, is_padding=None, slot_mapping={"l": torch.tensor([3, -1])}):
        assert steps.padding(2) is None


class Tape(TorchDispatchMode):
    """A CUDA graph in small: what is computed on tensors runs again on replay, and Python does not."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            if isinstance(out, torch.Tensor) and new is not out and new.data_ptr() != out.data_ptr():
                out.copy_(new)


def counted(counters):
    names = ("sparse_calls", "dense_calls", "sampled_inputs", "sampled_zeroed")
    return tuple(counters.values()[f"spon:{name}"] for name in names)


def test_replays_of_a_graph_count_what_their_tokens_are(counters):
    threshold, x, padding = torch.tensor([1.0]), torch.zeros(4, IN), torch.ones(4, dtype=torch.bool)
    counters.watch([threshold])
    with step(4, longest=None, mode=PIECEWISE, is_padding=padding), Tape() as tape:
        counters.count_sparse(x, threshold)
    assert counted(counters) == (0, 0, 0, 0)  # a graph is captured on rows that are all padding
    x[:, :12] = 2.0
    for real in (3, 1):
        padding[:real], padding[real:] = False, True
        tape.replay()
    assert counted(counters) == (2, 0, 4 * IN, 4 * (IN - 12))
    padding.fill_(True)
    tape.replay()  # a step that keeps other ranks company
    assert counted(counters) == (2, 0, 4 * IN, 4 * (IN - 12))


def test_steps_that_vllm_makes_up_are_not_counted(counters):
    threshold = torch.tensor([1.0])
    counters.watch([threshold])
    with step(4, longest=None):  # to measure memory, to warm up
        counters.count_sparse(rows(4), threshold)
        counters.count_dense(rows(4), threshold)
    with step(4, longest=None, mode=PIECEWISE, is_padding=None):  # captured by a vLLM that does not say what is padding
        counters.count_sparse(rows(4), threshold)
    assert counted(counters) == (0, 0, 0, 0)


def test_every_layer_is_counted_and_a_few_are_looked_at(counters):
    thresholds = [torch.tensor([float(index)]) for index in range(120)]
    counters.watch(thresholds)
    x = torch.full((2, IN), 59.5)
    with step(2):
        for threshold in thresholds:
            counters.count_sparse(x, threshold)
        for threshold in thresholds:
            counters.count_dense(x, threshold)
    sparse, dense, inputs, zeroed = counted(counters)
    assert (sparse, dense, inputs) == (120, 120, 8 * 2 * IN)
    assert zeroed / inputs in (3 / 8, 4 / 8, 5 / 8)  # those that are looked at lie in either half of the model


def test_numbers_reach_the_collector_though_no_step_follows(tmp_path, counters, monkeypatch):
    monkeypatch.setenv(metrics.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(metrics, "_SECONDS_BETWEEN_FILES", 0.05)
    assert list(metrics._Collector(tmp_path).collect()) == []  # nobody counts: no numbers, rather than zeros
    threshold = torch.tensor([1.0])
    counters.watch([threshold])
    with step(2):
        counters.count_sparse(rows(2), threshold)
    for _ in range(100):
        found = {family.name: family.samples[0].value for family in metrics._Collector(tmp_path).collect()}
        if found.get("spon:sparse_calls"):
            break
        torch.randn(1000, 1000) @ torch.randn(1000, 1000)
    assert list(found.values()) == [1, 0, 2 * IN, 2 * IN] and list(found) == list(metrics._HELP)
