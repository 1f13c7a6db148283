# SPDX-License-Identifier: Apache-2.0
"""What holds for every method: special tokens, alphas, biases, adapters, and the dense model afterwards."""

import pytest
import torch
from tiny_models import make_tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from spon_plugin import SponError, find_sites, fold_alpha, read_adapter, sparse_inputs, write_adapter
from spon_plugin.calibration.measurement import mean_alphas
from spon_plugin.decoder.positions import whole_windows
from spon_plugin.decoder.sparsity import SparsityCounter
from spon_plugin.sparsifiers import SPARSIFIERS, get_sparsifier
from spon_plugin.sparsifiers.calibrate import calibrate
from spon_plugin.sparsifiers.mean_bias import mean_biases
from spon_plugin.sparsifiers.rsparse import RSparse
from spon_plugin.studies.evaluation import evaluate, perplexity
from spon_plugin.weights.linears import linear_features

WINDOWS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
LAST = "model.layers.1.mlp.down_proj"
TARGET = {"cats": 0.3, "sats": 0.3, "chess": 0.3}
GATED = ("cats", "sats")
"""Methods that leave attention dense and mask the MLP's last linear."""
ADAPTERS = ("teal", "teal-greedy", "sensitivity", "wina", "scap", "rsparse")
ALLOCATION = {"teal-greedy": "greedy", "sensitivity": "sensitivity"}


def target(method):
    return TARGET.get(method, 0.5)


@pytest.fixture(scope="module")
def model():
    return make_tiny_llama()


@pytest.fixture(scope="module")
def fits(model):
    sites = find_sites(model)
    methods = {name: get_sparsifier(name) for name in SPARSIFIERS}
    methods["rsparse"] = RSparse(ratio=0.7)  # so that its rank is not 0 in a model of this size
    return {name: method.fit(model, sites, WINDOWS, target(name)) for name, method in methods.items()}


def outputs_of(model, path, ids=WINDOWS):
    """What the linear at `path` gives, and the logits."""
    seen = {}
    handle = model.get_submodule(path).register_forward_hook(lambda _m, args, y: seen.update(x=args[0], y=y))
    try:
        logits = model(input_ids=ids).logits
    finally:
        handle.remove()
    return seen["y"], logits


@pytest.mark.parametrize("method", SPARSIFIERS)
def test_the_target_is_met_and_the_model_is_left_dense(model, fits, method):
    dense, counter = model(input_ids=WINDOWS).logits, SparsityCounter()
    with fits[method].attach(model, counter=counter):
        sparse = model(input_ids=WINDOWS).logits
    assert fits[method].masked_share(counter) == pytest.approx(target(method), abs=0.02)
    assert not torch.allclose(sparse, dense, atol=1e-2)
    assert torch.equal(model(input_ids=WINDOWS).logits, dense)


@pytest.mark.parametrize("method", SPARSIFIERS)
def test_special_tokens_stay_dense_where_a_method_can(model, fits, method):
    dense = model(input_ids=WINDOWS).logits
    alphas = {LAST: torch.randn(96)}
    with fits[method].with_dense_prefix(1).attach(model, alphas):
        sparse = model(input_ids=WINDOWS).logits
    assert torch.equal(sparse[:, 0], dense[:, 0]) is not SPARSIFIERS[method].static
    assert not torch.allclose(sparse[:, 1], dense[:, 1], atol=1e-3)


@pytest.mark.parametrize("method", ["wanda", "wanda-2:4", "fixed-neuron"])
def test_static_methods_are_calibrated_on_every_position(model, method):
    statistics = get_sparsifier(method).calibrate(model, find_sites(model), WINDOWS)
    site = statistics.sites[0]
    inputs = []
    handle = model.get_submodule(site.modules[0]).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(input_ids=WINDOWS)
    handle.remove()
    power = 1 if method == "fixed-neuron" else 2
    torch.testing.assert_close(statistics.own[site.name].total, inputs[0].abs().pow(power).sum((0, 1)))
    assert get_sparsifier(method).at(model, statistics, 0.5).dense_prefix == 0


@pytest.mark.parametrize("method", SPARSIFIERS)
def test_alpha_adds_the_dense_weight_times_alpha(model, fits, method):
    alpha = torch.randn(96)
    with fits[method].attach(model):
        without, _ = outputs_of(model, LAST)
    with fits[method].attach(model, {LAST: alpha}):
        added, _ = outputs_of(model, LAST)
    expected = model.get_submodule(LAST).weight @ alpha
    torch.testing.assert_close(added - without, expected.expand_as(added), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", SPARSIFIERS)
def test_alphas_gradient_is_that_of_a_bias_through_the_dense_weight(model, fits, method):
    alpha = torch.zeros(96, requires_grad=True)
    with fits[method].attach(model, {LAST: alpha}):
        y, logits = outputs_of(model, LAST)
        y.retain_grad()
        logits.square().sum().backward()
    start = fits[method].dense_prefix
    expected = model.get_submodule(LAST).weight.t() @ y.grad[:, start:].sum((0, 1))
    torch.testing.assert_close(alpha.grad, expected, rtol=1e-3, atol=1e-3)
    assert expected.abs().max() > 1


@pytest.mark.parametrize("method", SPARSIFIERS)
def test_the_mean_bias_is_what_the_output_misses(model, fits, method):
    biases = mean_biases(model, fits[method], WINDOWS)
    path = next(iter(fits[method].modules)) if method not in GATED else "model.layers.0.mlp.down_proj"
    start = fits[method].skip
    dense, _ = outputs_of(model, path)
    with fits[method].attach(model, biases={path: biases[path]}):
        sparse, _ = outputs_of(model, path)
    # Up to this linear everything but itself (and, for `GATED`, attention) is dense.
    torch.testing.assert_close(sparse[:, start:].mean((0, 1)), dense[:, start:].mean((0, 1)), rtol=1e-3, atol=2e-4)
    assert (biases[path]).abs().max() > 1e-3


def test_the_mean_bias_of_teal_is_the_folded_mean_alpha(model, fits):
    fitted, sites = fits["teal"], find_sites(model)
    masks = {path: fitted.site_masks[site.name] for path, site in fitted.site_of.items()}
    alphas, biases = mean_alphas(model, sites, masks, WINDOWS), mean_biases(model, fitted, WINDOWS)
    for path, alpha in alphas.items():
        torch.testing.assert_close(biases[path], fold_alpha(model.get_submodule(path), alpha), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ADAPTERS)
def test_methods_that_fit_the_format_save_and_run_as_adapters(model, fits, method, tmp_path):
    fitted = fits[method]
    alphas = {path: torch.randn(site.in_features) * 0.1 for path, site in fitted.site_of.items()}
    write_adapter(fitted.adapter(alphas), tmp_path / "adapter")
    read = read_adapter(tmp_path / "adapter")
    assert read.fields.calibration["method"] == method and read.fields.alpha_modules == "all"
    assert read.fields.allocation == ALLOCATION.get(method, "uniform")
    if method == "rsparse":
        fitted.factors = {path: (a[:, :0], b[:0]) for path, (a, b) in fitted.factors.items()}
    with fitted.attach(model, alphas):
        own = model(input_ids=WINDOWS).logits
    with sparse_inputs(model, read.masks, read.fields.dense_prefix):
        torch.testing.assert_close(model(input_ids=WINDOWS).logits, own, rtol=1e-4, atol=1e-4)


def test_sensitivity_is_what_calibrate_makes(model, fits):
    made = calibrate(model, find_sites(model), WINDOWS, WINDOWS, 0.5, "sensitivity")
    own = fits["sensitivity"].adapter()
    assert own.fields.calibration["matched"] is made.fields.calibration["matched"] is True
    assert fits["teal"].adapter().fields.calibration["matched"] is False
    ours, theirs = own.tensors(), made.tensors()
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key])


@pytest.mark.parametrize("method", [name for name in SPARSIFIERS if name not in ADAPTERS])
def test_the_others_are_for_evaluation_only(fits, method):
    with pytest.raises(SponError, match=f"method: got '{method}'.*It is for evaluation only"):
        fits[method].adapter()


@pytest.mark.parametrize(
    ("kind", "given"),
    [("alpha", {"alphas": {"model.layers.0.mlp.gate_proj": torch.zeros(48)}}), ("bias", {"biases": {"lm_head": 0}})],
    ids=["alpha", "bias"],
)
def test_alphas_for_linears_that_stay_dense_are_refused(model, fits, kind, given):
    with (
        pytest.raises(SponError, match=f"{kind}: got 'one', expected none, as cats leaves this linear dense"),
        fits["cats"].attach(model, **given),
    ):
        pass


@pytest.mark.parametrize("method", [name for name, cls in SPARSIFIERS.items() if cls.universal])
def test_conv1d(method):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_embd=48, n_layer=2, n_head=4, initializer_range=0.2)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    sites = find_sites(model)
    fitted, counter = get_sparsifier(method).fit(model, sites, WINDOWS, 0.5), SparsityCounter()
    path = "transformer.h.0.attn.c_attn"
    biases = mean_biases(model, fitted, WINDOWS)
    dense, _ = outputs_of(model, path)
    with fitted.attach(model, counter=counter, biases={path: biases[path]}):
        sparse, _ = outputs_of(model, path)
    assert fitted.masked_share(counter) == pytest.approx(0.5, abs=0.03)
    start = fitted.skip
    torch.testing.assert_close(sparse[:, start:].mean((0, 1)), dense[:, start:].mean((0, 1)), rtol=1e-3, atol=2e-4)


class Packed(torch.nn.Linear):
    """A linear whose weight cannot be read, as in bitsandbytes."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        values = (linear.weight * 100).round().to(torch.int8)
        self.weight = torch.nn.Parameter(values, requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) / 100)


def test_packed_weights_take_alphas_and_biases_and_refuse_methods_that_read_them():
    model = make_tiny_llama()
    packed = model.model.layers[1].mlp.down_proj = Packed(model.get_submodule(LAST))
    sites = find_sites(model)
    fitted, alpha = get_sparsifier("teal").fit(model, sites, WINDOWS, 0.5), torch.randn(96, requires_grad=True)
    with fitted.attach(model):
        without, _ = outputs_of(model, LAST)
    with fitted.attach(model, {LAST: alpha}):
        added, _ = outputs_of(model, LAST)
        added.sum().backward()
    weight = packed.weight.float() / 100
    torch.testing.assert_close(added - without, (weight @ alpha).expand_as(added), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(alpha.grad, weight.sum(0) * added.shape[:2].numel(), rtol=1e-3, atol=1e-3)
    assert mean_biases(model, fitted, WINDOWS)[LAST].abs().max() > 1e-3
    for method in ("wina", "rsparse", "wanda", "sats", "acttail"):
        with pytest.raises(SponError, match="down_proj: weight: got .*torch.int8.*expected one whose values"):
            get_sparsifier(method).fit(model, sites, WINDOWS, 0.5)


def test_extra_bytes_are_counted(model, fits):
    outputs = sum(linear_features(model.get_submodule(path))[1] for path in fits["teal"].modules)
    sites, vectors = 8, 2 * (48 * 3 + 96)
    assert fits["teal"].extra_bytes(model) == 4 * sites
    assert fits["teal"].extra_bytes(model, fits["teal"].modules) == 4 * sites + 4 * outputs
    assert fits["teal"].extra_bytes(model, [LAST]) == 4 * sites + 4 * 48
    assert fits["wina"].extra_bytes(model) == 4 * vectors
    assert fits["scap"].extra_bytes(model) == fits["scap"].extra_bytes(model, [LAST]) == 4 * sites + 4 * outputs
    inputs = sum(linear_features(model.get_submodule(path))[0] for path in fits["teal"].modules)
    assert fits["sensitivity"].extra_bytes(model) == 2 * 4 * inputs + 4 * outputs
    assert fits["cats"].extra_bytes(model) == fits["sats"].extra_bytes(model) == 4 * 2
    assert fits["chess"].extra_bytes(model) == 4 * 2 * (96 + 2)
    assert fits["larosa"].extra_bytes(model) == 4 * 2 * 48 * 48
    counter = SparsityCounter()
    with fits["larosa"].attach(model, counter=counter):
        model(input_ids=WINDOWS)
    total = sum(site.weights for site in fits["larosa"].sites)
    net = fits["larosa"].masked_share(counter) - 2 * 48 * 48 / total
    assert fits["larosa"].read_share(counter) == pytest.approx(1 - net)


@pytest.mark.parametrize(("method", "prefix"), [("teal", 2), ("wanda", 0)])
def test_a_method_with_a_dense_prefix_leaves_it_dense(model, fits, method, prefix):
    with fits[method].with_dense_prefix(2).attach(model), whole_windows():
        sparse, _ = outputs_of(model, LAST)
    with fits[method].attach(model, dense_prefix=prefix), whole_windows():
        assert torch.equal(outputs_of(model, LAST)[0], sparse)
    assert fits[method].dense_prefix == 0


@pytest.mark.parametrize(("method", "agree"), [("teal", False), ("wanda", True)])
def test_the_protocol_says_what_is_dense_however_a_method_was_calibrated(model, method, agree):
    whole = get_sparsifier(method).fit(model, find_sites(model), WINDOWS, 0.5, dense_prefix=0)
    evaluated = evaluate(model, whole, WINDOWS, "all-but-first").perplexity
    with whole.attach(model):
        assert (evaluated == perplexity(model, WINDOWS)) is agree
