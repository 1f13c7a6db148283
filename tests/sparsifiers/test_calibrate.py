# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from masks import alphas_of

from spon_plugin import Mask, SponError, find_sites, sparse_inputs
from spon_plugin.calibration.allocation import allocate_greedy, masks_at
from spon_plugin.calibration.histogram import MagnitudeHistogram
from spon_plugin.calibration.measurement import mean_alphas, measure_sparsity
from spon_plugin.decoder.sites import module_weights
from spon_plugin.sparsifiers import adapter_methods, get_sparsifier
from spon_plugin.sparsifiers.calibrate import calibrate


def windows(count=16, length=64, seed=0) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


def histograms_of(model, sites, read, dense_prefix=1):
    """Site name -> magnitudes of the site's input."""
    return get_sparsifier("teal").calibrate(model, sites, read, dense_prefix).histograms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q", [0.01, 0.25, 0.5, 0.9, 0.999])
def test_a_histogram_quantile_zeroes_its_share(dtype, q):
    x = (torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 3e-3).to(dtype)
    histogram = MagnitudeHistogram()
    for chunk in x.split(7_001):
        histogram.update(chunk)
    assert histogram.total == x.numel()
    threshold = torch.tensor([histogram.quantile(q)])
    # One bin holds up to half a percent of the values around the median, and bfloat16 cannot split it.
    tolerance = 6e-3 if dtype == torch.bfloat16 else 1e-3
    assert (x.abs() <= threshold).float().mean().item() == pytest.approx(q, abs=tolerance)


def test_a_histogram_leaves_out_what_is_not_finite():
    histogram = MagnitudeHistogram()
    histogram.update(torch.tensor([1.0, float("nan"), float("inf"), -float("inf")]))
    assert histogram.total == 1
    assert histogram.quantile(0) == 0.0


@pytest.mark.parametrize("q", [0.5, 1.0])
def test_a_quantile_without_an_answer_is_refused(q):
    with pytest.raises(ValueError, match="quantile"):
        MagnitudeHistogram().quantile(q)


def test_histograms_leave_out_sinks_and_the_dense_prefix(tiny_llama):
    sites = find_sites(tiny_llama)
    for prefix, positions in ((0, 63), (1, 63), (10, 54)):
        histograms = histograms_of(tiny_llama, sites, windows(4), prefix)
        assert histograms[sites[0].name].total == 4 * positions * sites[0].in_features


@pytest.mark.parametrize(
    "shape", [pytest.param((0, 64), id="none"), pytest.param((4, 1), id="nothing-after-the-prefix")]
)
def test_windows_without_a_counted_token_are_refused(tiny_llama, shape):
    with pytest.raises(SponError, match="calibration windows: got"):
        histograms_of(tiny_llama, find_sites(tiny_llama), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.7])
@pytest.mark.parametrize("method", ["teal", "teal-greedy"])
def test_the_target_is_reached_model_wide_and_one_mask_is_one_site(tiny_llama, sparsity, method):
    sites = find_sites(tiny_llama)
    adapter = calibrate(tiny_llama, sites, windows(32), windows(8, seed=1), sparsity, method)
    achieved, _ = measure_sparsity(tiny_llama, sites, adapter.masks, windows(8, seed=2))
    assert achieved == pytest.approx(sparsity, abs=0.03)
    assert adapter.fields.calibration["achieved_sparsity"] == pytest.approx(achieved, abs=0.02)
    assert set(adapter.masks) == set(module_weights(sites)) and not adapter.has_alpha
    for site in sites:
        assert len({float(adapter.masks[path].threshold) for path in site.modules}) == 1
    adapter.check()


def test_uniform_thresholds_are_the_quantiles_of_the_dense_inputs(tiny_llama):
    sites = find_sites(tiny_llama)
    seen = []
    down = tiny_llama.get_submodule("model.layers.1.mlp.down_proj")
    handle = down.register_forward_pre_hook(lambda _m, args: seen.append(args[0][:, 1:].abs().flatten()))
    tiny_llama(input_ids=windows())
    handle.remove()
    masks = masks_at(sites, histograms_of(tiny_llama, sites, windows()), 0.6)
    expected = torch.cat(seen).quantile(0.6).item()
    assert masks["model.layers.1.mlp.down_proj"].threshold.item() == pytest.approx(expected, rel=5e-3)


def test_greedy_spends_the_same_weights_with_less_error_than_uniform(tiny_llama):
    sites = [site for site in find_sites(tiny_llama) if site.block == "model.layers.0"]
    histograms = histograms_of(tiny_llama, sites, windows())
    shares = allocate_greedy(tiny_llama, sites, histograms, windows(), 0.5)
    total = sum(site.weights for site in sites)
    assert sum(shares[site.name] * site.weights for site in sites) / total == pytest.approx(0.5)
    assert len(set(shares.values())) > 1

    def error(share) -> float:
        with sparse_inputs(tiny_llama, masks_at(sites, histograms, share), dense_prefix=1):
            out = tiny_llama.model(input_ids=windows(), output_hidden_states=True).hidden_states[1]
        return (out - tiny_llama.model(input_ids=windows(), output_hidden_states=True).hidden_states[1]).norm().item()

    assert error(shares) < error(0.5)


def test_mean_alphas_are_the_mean_of_what_the_mask_drops(tiny_llama):
    sites = find_sites(tiny_llama)
    masks = masks_at(sites, histograms_of(tiny_llama, sites, windows()), 0.5)
    path, seen = "model.layers.0.self_attn.k_proj", []
    handle = tiny_llama.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0][:, 1:]))
    tiny_llama(input_ids=windows())
    handle.remove()
    x = seen[0].flatten(0, 1)
    expected = torch.where(x.abs() <= masks[path].threshold, x, 0).mean(0)
    alphas = mean_alphas(tiny_llama, sites, masks, windows())
    torch.testing.assert_close(alphas[path], expected, rtol=1e-4, atol=1e-6)
    assert alphas.keys() == masks.keys()
    site = next(site for site in sites if path in site.modules)
    center = torch.linspace(-1, 1, x.shape[1])
    masks.update({module: Mask(masks[module].threshold, center) for module in site.modules})
    masked = (x - center).abs() <= masks[path].threshold
    expected = torch.where(masked, x - center, 0).mean(0)
    alphas = mean_alphas(tiny_llama, sites, masks, windows())
    torch.testing.assert_close(alphas[path], expected, rtol=1e-4, atol=1e-6)
    _, shares = measure_sparsity(tiny_llama, sites, {path: masks[path]}, windows(), dense_prefix=1)
    assert shares == {path: pytest.approx(masked.float().mean().item())}


def test_mean_alphas_are_those_of_each_linear_where_a_site_has_several_masks(tiny_llama):
    sites = find_sites(tiny_llama)
    site = next(site for site in sites if len(site.modules) == 3)
    masks = {path: Mask(torch.tensor([0.1 * (i + 1)])) for i, path in enumerate(site.modules)}
    alphas = mean_alphas(tiny_llama, [site], masks, windows())
    for path in site.modules:
        alone = mean_alphas(tiny_llama, [site], dict.fromkeys(site.modules, masks[path]), windows())
        torch.testing.assert_close(alphas[path], alone[path])
    assert not torch.allclose(alphas[site.modules[0]], alphas[site.modules[2]])


def test_calibration_is_reproducible_and_says_where_it_comes_from(tiny_llama):
    def make():
        return calibrate(
            tiny_llama,
            find_sites(tiny_llama),
            windows(),
            windows(2, seed=1),
            0.5,
            alpha="zero",
            alpha_modules=["down_proj"],
            source={"seed": 7},
            base_model="some/base",
        )

    adapter, again = make(), make()
    assert adapter.digest == again.digest and adapter.config() == again.config()
    assert set(alphas_of(adapter)) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert not any(alpha.any() for alpha in alphas_of(adapter).values())
    assert adapter.base_model == "some/base"
    recorded = adapter.fields.calibration
    assert recorded["seed"] == 7 and recorded["tokens"] == 16 * 64 and len(recorded["sites"]) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, "sparsity: got 1.0"),
        ({"method": "best"}, "method: got 'best'"),
        ({"method": "topk"}, "method: got 'topk', expected one that masks inputs by thresholds: teal, "),
        ({"alpha": "zero", "alpha_modules": ["fc1"]}, "alpha_modules: got .*fc1.*, expected .*down_proj"),
        ({"dense_prefix": -1}, "dense_prefix: got -1"),
    ],
    ids=["sparsity", "method", "method-for-evaluation", "alpha-modules", "dense-prefix"],
)
def test_wrong_settings_are_named_before_the_model_runs(tiny_llama, changes, message, monkeypatch):
    sites = find_sites(tiny_llama)
    monkeypatch.setattr(type(tiny_llama), "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(SponError, match=message):
        calibrate(tiny_llama, sites, windows(), windows(), **{"sparsity": 0.5, **changes})


@pytest.mark.parametrize("method", adapter_methods())
def test_every_method_that_fits_the_format_makes_an_adapter_with_a_unit_for_each_alpha(tiny_llama, method):
    sites = find_sites(tiny_llama)
    with torch.no_grad():  # a channel without weights, whose threshold under WINA is the largest number there is
        for name in ("q_proj", "k_proj", "v_proj"):
            tiny_llama.get_submodule(f"model.layers.0.self_attn.{name}").weight[:, 3] = 0
    adapter = calibrate(tiny_llama, sites, windows(32), windows(8, seed=1), 0.5, method, alpha="zero")
    adapter.check()
    achieved, _ = measure_sparsity(tiny_llama, sites, adapter.masks, windows(8, seed=2), adapter.fields.dense_prefix)
    assert achieved == pytest.approx(0.5, abs=0.05)
    assert adapter.fields.calibration["method"] == method
    scales = adapter.fields.alpha_scale
    assert scales.keys() == set(module_weights(sites))
    typical = {
        site.name: histogram.quantile(0.5)
        for site, histogram in zip(sites, histograms_of(tiny_llama, sites, windows(32)).values(), strict=True)
    }
    for site in sites:
        for path in site.modules:
            assert 0.1 * typical[site.name] < scales[path] < 10 * typical[site.name]
