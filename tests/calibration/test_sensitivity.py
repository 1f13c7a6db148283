# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from spon_plugin import SponError, find_sites, read_adapter, sparse_inputs, write_adapter
from spon_plugin.calibration.measurement import measure_sparsity
from spon_plugin.calibration.sensitivity import (
    Group,
    RowSample,
    SiteSample,
    best_centers,
    collect_fisher,
    match_sparsity,
    solve,
)
from spon_plugin.sparsifiers import get_sparsifier
from spon_plugin.sparsifiers.calibrate import calibrate, settle


def windows(count=16, length=64, seed=0) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "path", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
)
@pytest.mark.parametrize("layer", [0, 1])
def test_fisher_is_the_mean_squared_gradient_of_the_sampled_log_likelihood(tiny_llama, layer, path):
    """By a plain autograd pass, with the input of this linear alone as a leaf."""
    path, ids = f"model.layers.{layer}.{path}", windows(1, 24)
    generator = torch.Generator().manual_seed(5)
    drawn = torch.multinomial(tiny_llama(input_ids=ids).logits[0].softmax(-1), 1, generator=generator)[:, 0]
    leaf: list[torch.Tensor] = []

    def replace(_module, args):
        leaf[:] = [args[0].detach().requires_grad_()]
        return leaf[0]

    handle = tiny_llama.get_submodule(path).register_forward_pre_hook(replace)
    F.cross_entropy(tiny_llama(input_ids=ids).logits[0], drawn, reduction="sum").backward()
    handle.remove()
    assert leaf[0].grad is not None
    expected = leaf[0].grad[0, 1:].square().mean(0)
    fisher = collect_fisher(tiny_llama, find_sites(tiny_llama), ids, seed=5)
    torch.testing.assert_close(fisher.counted[path], expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(fisher.first[path], leaf[0].grad[0, 0].square(), rtol=1e-4, atol=1e-9)
    assert fisher.first_share == 1 / 24


def test_reading_sensitivity_leaves_the_model_as_it_was(tiny_llama):
    tiny_llama.lm_head.weight.requires_grad_(True)
    before = tiny_llama(input_ids=windows(1)).logits
    get_sparsifier("sensitivity").calibrate(tiny_llama, find_sites(tiny_llama), windows(2))
    assert [n for n, p in tiny_llama.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llama.modules())
    assert torch.equal(tiny_llama(input_ids=windows(1)).logits, before)


def test_samples_are_spread_over_the_text_and_limited(tiny_llama):
    sites = find_sites(tiny_llama)
    fisher = collect_fisher(tiny_llama, sites, windows(8))
    for site in sites:
        rows = RowSample.of(windows(8), 1, max_rows=100)
        for batch in torch.randn(2, 252, site.in_features):
            rows.update(batch)
        sample = rows.sample(site, fisher)
        assert 80 <= len(sample.rows) <= 112
        assert [n * site.in_features for n in sample.outputs.values()] == list(site.module_weights)
        assert tuple(sample.fisher) == site.modules


@pytest.mark.parametrize(
    "shape", [pytest.param((0, 64), id="none"), pytest.param((4, 1), id="nothing-after-the-prefix")]
)
def test_windows_without_a_counted_token_are_refused(tiny_llama, shape):
    with pytest.raises(SponError, match="calibration windows: got"):
        collect_fisher(tiny_llama, find_sites(tiny_llama), torch.zeros(shape, dtype=torch.int64))


def samples_of(scales, fishers, outputs=(4, 4), rows=4000) -> list[SiteSample]:
    """A site of one linear for every scale, by the names 0, 1, ..."""
    generator = torch.Generator().manual_seed(0)
    return [
        SiteSample(torch.randn(rows, len(f), generator=generator) * s, {str(i): torch.tensor(f)}, {str(i): o})
        for i, (s, f, o) in enumerate(zip(scales, fishers, outputs, strict=True))
    ]


def test_the_quadratic_form_gives_thresholds_by_the_formula():
    samples = samples_of((1.0, 3.0), ([1.0, 4.0, 0.25], [1.0, 1.0, 16.0]), outputs=(8, 2))
    masks = solve(samples, 0.5, blend=1.0)
    prices = [masks[p].threshold ** 2 * f / s.outputs[p] for s in samples for p, f in s.fisher.items()]
    torch.testing.assert_close(torch.cat(prices), prices[0][0].expand(6), rtol=1e-4, atol=0)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_the_target_is_met_on_the_samples_weighted_by_weights(sparsity, blend):
    samples = samples_of((1.0, 5.0), ([1.0, 9.0], [0.01, 0.02, 3.0]), outputs=(10, 1))
    fisher = samples[0].fisher | {"other": torch.tensor([5.0, 2.0])}
    samples[0] = SiteSample(samples[0].rows, fisher, samples[0].outputs | {"other": 3})
    masks = solve(samples, sparsity, blend)
    assert torch.equal(masks["0"].center, masks["other"].center)
    dropped = total = 0.0
    for sample in samples:
        for path, outputs in sample.outputs.items():
            near = (sample.rows - masks[path].center).abs() <= masks[path].threshold
            dropped += outputs * near.float().sum().item()
            total += outputs * near.numel()
    assert dropped / total == pytest.approx(sparsity, abs=2e-3)


def test_without_sensitivities_the_thresholds_are_uniform_teal():
    samples = samples_of((1.0, 5.0), ([1.0, 9.0], [0.01, 0.02]))
    masks = solve(samples, 0.5, blend=0.0)
    torch.testing.assert_close(masks["1"].threshold / masks["0"].threshold, torch.full((2,), 5.0), rtol=0.05, atol=0)


def test_a_center_finds_the_entries_that_lie_close_together():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5000, 3, generator=generator) * torch.tensor([1.0, 0.1, 1.0]) + torch.tensor([0.0, 2.0, 0.0])
    rows[::10, 1] += 30  # outliers, which are kept and must not pull the centre
    centers = best_centers([Group(rows, [torch.ones(3)])], [torch.tensor([0.5, 0.5, 0.0])])
    torch.testing.assert_close(centers, torch.tensor([0.0, 2.0, 0.0]), rtol=0, atol=0.1)
    near = (rows[:, 1] - centers[1]).abs() <= 0.5
    assert centers[1].item() == pytest.approx(rows[near, 1].mean().item(), abs=1e-4)


def test_linears_share_the_center_that_serves_them_together():
    rows = torch.cat([torch.full((60, 1), -1.0), torch.full((40, 1), 3.0)])
    wide, narrow = torch.tensor([10.0]), torch.tensor([0.5])
    mean, mode = torch.tensor([0.6]), torch.tensor([-1.0])
    for importance, expected in (((1.0, 0.0), mean), ((0.0, 1.0), mode), ((1e-6, 1.0), mode)):
        centers = best_centers([Group(rows, [torch.tensor([f]) for f in importance])], [wide, narrow])
        torch.testing.assert_close(centers, expected, rtol=0, atol=1e-3)


def test_a_center_minds_the_first_positions_as_much_as_the_output_does():
    """What serves a hundred rows is given up where one first row feels it more than all of them."""
    rows, first = torch.full((100, 3), 1.0), torch.zeros(2, 3)
    others = Group(rows, [torch.tensor([0.99, 0.99, 0.99])])
    apart = Group(first, [torch.tensor([0.0, 0.99, 1000.0])])
    centers = best_centers([others, apart], [torch.full((3,), 2.0)])
    torch.testing.assert_close(centers, torch.tensor([1.0, 0.5, 0.0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("skip", "prefix", "first"), [(1, 0, [0]), (3, 0, [0, 1, 2]), (3, 2, [2]), (2, 2, [])], ids=str
)
def test_the_first_positions_that_are_masked_are_kept_apart(tiny_llama, skip, prefix, first):
    sites, ids = find_sites(tiny_llama), windows(2, 16)
    inputs: list[torch.Tensor] = []
    lead = sites[3].modules[0]
    handle = tiny_llama.get_submodule(lead).register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    tiny_llama(input_ids=ids)
    handle.remove()
    fisher = collect_fisher(tiny_llama, sites, ids, skip, prefix)
    groups = fisher.groups(inputs[0][:, skip:].flatten(0, 1), sites[3].modules)
    assert fisher.first_share == len(first) / (16 - prefix)
    assert len(groups) == (2 if first else 1)
    if first:
        torch.testing.assert_close(groups[1].rows, inputs[0][:, first].flatten(0, 1))
        torch.testing.assert_close(groups[1].importance[0], fisher.first[lead] * fisher.first_share)
    torch.testing.assert_close(groups[0].importance[0], fisher.counted[lead] * (1 - fisher.first_share))


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_sensitivity_reaches_the_target_with_less_divergence_than_uniform(tiny_llama, tmp_path, sparsity):
    sites, held_out = find_sites(tiny_llama), windows(16, seed=1)
    dense = tiny_llama(input_ids=held_out).logits.log_softmax(-1)

    def divergence(adapter) -> float:
        achieved, _ = measure_sparsity(tiny_llama, sites, adapter.masks, held_out)
        assert achieved == pytest.approx(sparsity, abs=0.015)
        with sparse_inputs(tiny_llama, adapter.masks, 1):
            sparse = tiny_llama(input_ids=held_out).logits.log_softmax(-1)
        return F.kl_div(sparse, dense, log_target=True, reduction="sum").item() / held_out.numel()

    ours, uniform = (
        calibrate(tiny_llama, sites, windows(32), held_out, sparsity, method) for method in ("sensitivity", "teal")
    )
    assert divergence(ours) < 0.95 * divergence(uniform)
    write_adapter(ours, tmp_path / "adapter")
    kept = read_adapter(tmp_path / "adapter")
    assert kept.fields.allocation == "sensitivity" and kept.digest == ours.digest
    for site in sites:
        for path in site.modules[1:]:
            assert torch.equal(ours.masks[path].center, ours.masks[site.modules[0]].center)


def test_matching_multiplies_all_thresholds_by_one_factor(tiny_llama):
    sites = find_sites(tiny_llama)
    start = calibrate(tiny_llama, sites, windows(8), windows(4, seed=1), 0.3).masks
    matched = match_sparsity(tiny_llama, sites, start, windows(8), 0.6)
    factors = torch.cat([matched[path].threshold / start[path].threshold for path in start])
    torch.testing.assert_close(factors, factors[0].expand_as(factors))
    achieved, _ = measure_sparsity(tiny_llama, sites, matched, windows(8))
    assert achieved == pytest.approx(0.6, abs=0.004)


@pytest.mark.parametrize(
    ("method", "match"), [("teal", False), ("teal", True), ("sensitivity", False)], ids=lambda v: str(v)
)
def test_after_training_sparsity_is_measured_anew_and_a_matched_target_met_again(tiny_llama, method, match):
    sites, held_out = find_sites(tiny_llama), windows(16, seed=1)
    start = calibrate(tiny_llama, sites, windows(32), held_out, 0.5, method, alpha="zero", match=match)
    assert start.fields.calibration["matched"] == (match or method == "sensitivity")
    generator = torch.Generator().manual_seed(0)
    for path, mask in start.masks.items():  # as large as training never makes them, so that they are felt
        alpha = 3 * mask.threshold.mean() * torch.randn(mask.alpha.shape, generator=generator)
        start.masks[path] = replace(mask, alpha=alpha)
    before, _ = measure_sparsity(tiny_llama, sites, start.masks, held_out)
    settled = settle(tiny_llama, start, windows(32), held_out)
    after, _ = measure_sparsity(tiny_llama, sites, settled.masks, held_out)
    assert abs(before - 0.5) > 0.03
    assert settled.fields.calibration["achieved_sparsity"] == pytest.approx(after, abs=1e-4)
    assert settled.fields.calibration["tokens"] == start.fields.calibration["tokens"]
    if not start.fields.calibration["matched"]:
        assert all(torch.equal(settled.masks[path].threshold, mask.threshold) for path, mask in start.masks.items())
    else:
        assert after == pytest.approx(0.5, abs=0.015)
    assert all(settled.masks[path].alpha is mask.alpha for path, mask in start.masks.items())
