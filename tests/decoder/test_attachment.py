# SPDX-License-Identifier: Apache-2.0
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from spon_plugin import Mask, SparsityCounter, SponError, find_sites, sparse_inputs, sparsify

IDS = torch.arange(24).view(2, 12) * 7 % 255 + 1
DOWN = "model.layers.1.mlp.down_proj"


def test_a_layer_under_masks_computes_the_formula(tiny_llama):
    layer, seen = tiny_llama.get_submodule(DOWN), {}
    alpha, threshold = torch.randn(96), torch.tensor([0.2])
    before = layer.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0].clone()))
    with sparse_inputs(tiny_llama, {DOWN: Mask(threshold, alpha=alpha)}, dense_prefix=2):
        after = layer.register_forward_hook(lambda _m, _args, y: seen.update(y=y))
        tiny_llama(input_ids=IDS)
    before.remove()
    after.remove()
    x = seen["x"]
    dense = x @ layer.weight.t()
    sparse = torch.where(x.abs() > 0.2, x, 0) @ layer.weight.t() + layer.weight @ alpha
    torch.testing.assert_close(seen["y"][:, :2], dense[:, :2])
    torch.testing.assert_close(seen["y"][:, 2:], sparse[:, 2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_alpha", [False, True], ids=["no-alpha", "alpha"])
@pytest.mark.parametrize("per_channel", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_centres_and_thresholds_per_channel_compute_the_formula(tiny_llama, dtype, per_channel, with_alpha):
    layer, seen = tiny_llama.to(dtype).get_submodule(DOWN), {}
    alpha, center = torch.randn(96) * with_alpha, torch.randn(96) * 0.2
    threshold = torch.rand(96) * 0.4 if per_channel else torch.tensor([0.2])
    before = layer.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0].clone()))
    counter = SparsityCounter()
    mask = Mask(threshold, center, alpha if with_alpha else None)
    with sparse_inputs(tiny_llama, {DOWN: mask}, 2, counter):
        after = layer.register_forward_hook(lambda _m, _args, y: seen.update(y=y))
        tiny_llama(input_ids=IDS)
    before.remove()
    after.remove()
    x, weight = seen["x"].double(), layer.weight.double()
    keep = (x - center).abs() > threshold
    sparse = torch.where(keep, x, center.double()) @ weight.t() + weight @ alpha.double()
    torch.testing.assert_close(seen["y"][:, :2].double(), (x @ weight.t())[:, :2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen["y"][:, 2:].double(), sparse[:, 2:], rtol=1e-4, atol=1e-5)
    assert counter.per_module()[DOWN] == pytest.approx(1 - keep[:, 2:].double().mean().item())
    assert 0.1 < counter.per_module()[DOWN] < 0.99


def test_a_float64_model_stays_float64(tiny_llama):
    model = tiny_llama.double()
    layer, seen = model.get_submodule(DOWN), {}
    mask = Mask(torch.tensor([0.2]), torch.randn(96) * 0.1, torch.randn(96))
    before = layer.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0].clone()))
    with sparse_inputs(model, {DOWN: mask}):
        after = layer.register_forward_hook(lambda _m, _args, y: seen.update(y=y))
        model(input_ids=IDS)
    before.remove()
    after.remove()
    kept = torch.where((seen["x"] - mask.center).abs() > 0.2, seen["x"] - mask.center, 0)
    expected = kept @ layer.weight.t() + layer.weight @ mask.constant.double()
    torch.testing.assert_close(seen["y"], expected, rtol=1e-12, atol=1e-12)


def test_linears_that_read_one_tensor_share_its_mask(tiny_llama, monkeypatch):
    """Four sites a block, whichever tensors hold the equal masks of q, k and v; other masks are not shared."""
    calls, original = [], Mask.sparse_deviation
    monkeypatch.setattr(Mask, "sparse_deviation", lambda mask, x: calls.append(mask) or original(mask, x))
    paths = [path for site in find_sites(tiny_llama) for path in site.modules]
    masks = {path: Mask(torch.tensor([0.2])) for path in paths}
    counter = SparsityCounter()
    with sparse_inputs(tiny_llama, masks, counter=counter):
        tiny_llama(input_ids=IDS)
    assert len(calls) == 8 and len(counter.per_module()) == 14
    apart = {**masks, paths[1]: Mask(torch.tensor([0.3]))}
    with sparse_inputs(tiny_llama, apart, counter=counter):
        tiny_llama(input_ids=IDS)
    assert len(calls) == 8 + 9


class Beside(torch.nn.Module):
    """Two linears of one input, which is written to between them if `writes`."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.a, self.b, self.writes = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False), writes

    def forward(self, x):
        x = x + 0
        first = self.a(x)
        if self.writes:
            x.mul_(-2)
        return first + self.b(x)


@pytest.mark.parametrize("writes", [False, True], ids=["as it was", "written to"])
def test_a_tensor_that_is_written_to_is_masked_anew(writes):
    model, x = Beside(writes), torch.randn(3, 8)
    with torch.no_grad(), sparse_inputs(model, {name: Mask(torch.tensor([0.5])) for name in "ab"}):
        got = model(x)
    second = -2 * x if writes else x
    expected = model.a(sparsify(x, torch.tensor([0.5]))) + model.b(sparsify(second, torch.tensor([0.5])))
    torch.testing.assert_close(got, expected)


def test_threads_do_not_meet(tiny_llama):
    paths = [path for site in find_sites(tiny_llama) for path in site.modules]
    masks = {
        path: Mask(torch.tensor([0.2]), alpha=torch.zeros(model_inputs))
        for path, model_inputs in ((path, tiny_llama.get_submodule(path).in_features) for path in paths)
    }
    ids = [torch.randint(1, 255, (1, 3 + 5 * i)) for i in range(8)]
    with torch.no_grad(), sparse_inputs(tiny_llama, masks):
        alone = [tiny_llama(input_ids=row).logits for row in ids]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda row: run(tiny_llama, row), ids * 4))
    assert all(torch.equal(got, want) for got, want in zip(together, alone * 4, strict=True))


def run(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_a_vector_of_another_length_is_named_before_a_pass(tiny_llama):
    for mask in (Mask(torch.ones(7)), Mask(torch.ones(1), alpha=torch.ones(7))):
        with pytest.raises(SponError, match=r"down_proj\..*got \(7,\), expected shape \(96,\)"):
            sparse_inputs(tiny_llama, {DOWN: mask}).__enter__()


def test_a_model_that_trains_is_differentiated_more_than_once(tiny_llama):
    tiny_llama.requires_grad_(True)
    with sparse_inputs(tiny_llama, {DOWN: Mask(torch.tensor([0.2]), alpha=torch.ones(96))}):
        for _ in range(2):
            tiny_llama(input_ids=IDS).logits.sum().backward()


def test_nothing_is_left_behind(tiny_llama):
    dense = tiny_llama(input_ids=IDS).logits
    with pytest.raises(RuntimeError), sparse_inputs(tiny_llama, {DOWN: Mask(torch.tensor([9.0]))}):
        raise RuntimeError
    assert torch.equal(tiny_llama(input_ids=IDS).logits, dense)


def test_zero_thresholds_are_the_dense_model(tiny_llama):
    masks = {f"model.layers.{i}.mlp.down_proj": Mask(torch.zeros(1)) for i in (0, 1)}
    with sparse_inputs(tiny_llama, masks):
        masked = tiny_llama(input_ids=IDS).logits
    assert torch.equal(masked, tiny_llama(input_ids=IDS).logits)


def test_the_counter_counts_masked_tokens_only(tiny_llama):
    counter = SparsityCounter()
    with sparse_inputs(tiny_llama, {DOWN: Mask(torch.tensor([1e9]))}, dense_prefix=5, counter=counter):
        tiny_llama(input_ids=IDS)
    assert counter.per_module() == {DOWN: 1.0}
    assert counter._total[DOWN] == 2 * (12 - 5) * 96
    assert counter.overall({DOWN: 10}) == 1.0


def test_the_overall_sparsity_is_weighted_by_weights():
    counter = SparsityCounter()
    counter.add("a", torch.tensor([True, False]))
    counter.add("b", torch.tensor([True, True]))
    assert counter.overall({"a": 300, "b": 100}) == pytest.approx(0.5 * 300 / 400)
