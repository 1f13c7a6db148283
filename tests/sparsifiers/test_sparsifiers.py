# SPDX-License-Identifier: Apache-2.0
"""Each method against its paper's formula on small tensors written out."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spon_plugin import SponError, find_sites
from spon_plugin.decoder.sparsity import SparsityCounter
from spon_plugin.sparsifiers import SPARSIFIERS, get_sparsifier
from spon_plugin.sparsifiers.acttail import allocate, tail_exponent
from spon_plugin.sparsifiers.larosa import spread
from spon_plugin.sparsifiers.rsparse import RSparse, low_rank
from spon_plugin.sparsifiers.sats import DistortionCurve
from spon_plugin.sparsifiers.wanda import pruned_two_of_four, pruned_weights


class Decoder(nn.Module):
    """One block whose input is the token's row of a table."""

    def __init__(self, inputs, block):
        super().__init__()
        inputs = torch.tensor(inputs)
        self.embedding = nn.Embedding.from_pretrained(inputs)
        self.layers = nn.ModuleList([block])

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.layers[0](self.embedding(input_ids)))


class Linears(nn.Module):
    """Linears that read one tensor; the output is theirs side by side."""

    def __init__(self, *weights):
        super().__init__()
        self.linears = nn.ModuleList()
        for weight in weights:
            weight = torch.tensor(weight)
            self.linears.append(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
            self.linears[-1].weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return torch.cat([linear(x) for linear in self.linears], dim=-1)


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate = nn.Linear(4, 8, bias=False), nn.Linear(4, 8, bias=False)
        self.down, self.act_fn = nn.Linear(8, 4, bias=False), nn.SiLU()

    def forward(self, x):
        up = self.up(x)  # called first: the gate is found by what it computes
        return self.down(self.act_fn(self.gate(x)) * up)


class SelfAttention(nn.Module):
    """Four projections named as usual, without the softmax between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(4, 4, bias=False))

    def forward(self, x):
        return self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.ffn = SelfAttention(), GatedMLP()

    def forward(self, x):
        return self.ffn(self.self_attn(x))


W = [[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, 2.0, 1.0]]
X = [[1.0, -2.0, 3.0, -4.0], [5.0, 6.0, -7.0, 8.0]]


def fit(method, inputs, *weights, sparsity=0.5):
    """The method fitted on one window of all tokens; its outputs on them, what is masked, and the fitted method."""
    model = Decoder(inputs, Linears(*weights))
    ids = torch.arange(len(inputs))[None]
    sparsifier = get_sparsifier(method) if isinstance(method, str) else method
    fitted = sparsifier.fit(model, find_sites(model, example={"input_ids": ids}), ids, sparsity, skip=0)
    counter = SparsityCounter()
    with fitted.attach(model, counter=counter):
        out = model(input_ids=ids).logits[0]
    return out, fitted.masked_share(counter), fitted


def outputs(sparse, *weights):
    return torch.tensor(sparse) @ torch.cat([torch.tensor(weight) for weight in weights]).t()


def test_teal_keeps_magnitudes_above_the_quantile():
    out, masked, _ = fit("teal", X, W)
    torch.testing.assert_close(out, outputs([[0.0, 0.0, 0.0, 0.0], X[1]], W))
    assert masked == 0.5


def test_wina_keeps_magnitudes_times_the_norm_of_the_weights_that_share_them():
    # Stacked columns: (8), (1), (1), (0.6, 0.8): norms 8, 1, 1, 1; scores 8 2 3 4 and 40 6 7 8.
    q, k = [[8.0, 1.0, 0.0, 0.6]], [[0.0, 0.0, 1.0, 0.8]]
    out, masked, fitted = fit("wina", X, q, k)
    torch.testing.assert_close(out, outputs([[1.0, 0.0, 0.0, 0.0], [5.0, 0.0, -7.0, 8.0]], q, k))
    (threshold,) = (mask.threshold for mask in fitted.site_masks.values())
    torch.testing.assert_close(threshold[0] * 8, threshold[1])
    assert masked == 0.5


def test_wina_drops_a_channel_without_weights():
    out, _, fitted = fit("wina", X, [[1.0, 0.0, 1.0, 1.0]])
    (threshold,) = (mask.threshold for mask in fitted.site_masks.values())
    assert torch.isfinite(threshold).all() and threshold[1] > 1e38
    assert torch.isfinite(out).all()


def test_scap_measures_from_the_mode_and_puts_it_where_it_drops():
    # The median is 10; distances 0 1 0.5 4 and 0 4 2 3: the four largest are kept.
    inputs = [[10.0, 11.0, 9.5, 14.0], [10.0, 6.0, 12.0, 13.0]]
    out, masked, fitted = fit("scap", inputs, W)
    (center,) = (mask.center for mask in fitted.site_masks.values())
    eta = float(center[0])
    assert eta == pytest.approx(10, rel=1 / 128) and torch.equal(center, torch.full((4,), eta))
    torch.testing.assert_close(out, outputs([[eta, eta, eta, 14.0], [eta, 6.0, 12.0, 13.0]], W))
    assert masked == 0.5
    dense = outputs(inputs, W)
    assert (out - dense).abs().max() < 0.2 * (fit("teal", inputs, W)[0] - dense).abs().max()


def test_topk_keeps_the_largest_of_each_token():
    out, masked, _ = fit("topk", X, W)
    torch.testing.assert_close(out, outputs([[0.0, 0.0, 3.0, -4.0], [0.0, 0.0, -7.0, 8.0]], W))
    assert masked == 0.5


def test_larosa_keeps_the_largest_after_rotation_to_the_principal_axes():
    # The tokens lie on (1, 1) and (1, -1): one entry each in the rotated basis, two in the original.
    inputs = [[3.0, 3.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0]]
    out, masked, fitted = fit("larosa", inputs, W, sparsity=0.75)
    torch.testing.assert_close(out, outputs(inputs, W))
    assert masked == 0.75 and fitted.extra_reads == 16
    assert not torch.allclose(fit("topk", inputs, W, sparsity=0.75)[0], outputs(inputs, W))
    (rotation,) = fitted.rotations.values()
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(4))


@pytest.mark.parametrize("sparsity", [0.25, 0.6, 0.9])
def test_larosa_spreads_the_target_over_the_model(tiny_llama, sparsity):
    sites = find_sites(tiny_llama)
    shares = spread(sites, sparsity)
    total = sum(site.weights for site in sites)
    assert sum(shares[site.name] * site.weights for site in sites) / total == pytest.approx(sparsity)
    high, low = shares["model.layers.0.mlp_out"], shares["model.layers.0.mlp_in"]
    assert high == pytest.approx(min(1.5 * low, 0.95)) and 0 < low < 1


def test_rsparse_sends_the_small_inputs_through_the_truncated_svd():
    torch.manual_seed(0)
    weight = torch.randn(4, 4)
    out, masked, fitted = fit(RSparse(ratio=0.25), X, weight.tolist(), sparsity=0.25)
    u, s, vh = torch.linalg.svd(weight)
    approximation = s[0] * torch.outer(u[:, 0], vh[0])  # (1 - 0.25) * (1 - 0.25) * 16 / 8 numbers: rank 1
    x = torch.tensor(X)
    score = x.abs() * (vh.t() * s).norm(dim=1)  # the released code's scale: rows of V Sigma
    keep = score > score.flatten().sort().values[5]  # 0.75 * 16 - 8 numbers are left: one channel in four
    torch.testing.assert_close(out, (x * keep) @ weight.t() + (x * ~keep) @ approximation.t(), rtol=1e-4, atol=1e-4)
    assert masked == pytest.approx(0.25) and fitted.extra_reads == 8


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=["wide", "tall"])
def test_low_rank_is_the_truncated_svd(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    for rank in (0, 2, 5):
        a, b = low_rank(weight, rank)
        assert a.shape == (shape[0], rank) and b.shape == (rank, shape[1])
        torch.testing.assert_close(a @ b, (u[:, :rank] * s[:rank]) @ vh[:rank], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a[:, -1:] @ b[-1:], s[0] * torch.outer(u[:, 0], vh[0]), rtol=1e-4, atol=1e-5)


def test_wanda_prunes_each_rows_lowest_weight_times_input_norm():
    inputs = [[4.0, 0.6, 1.0, 0.0], [0.0, 0.8, 0.0, 1.0]]  # norms 4 1 1 1
    weight = [[1.0, -2.0, 3.0, -4.0], [1.0, -5.0, 6.0, 2.0]]  # scores 4 2 3 4 and 4 5 6 2
    out, masked, _ = fit("wanda", inputs, weight)
    torch.testing.assert_close(out, outputs(inputs, [[1.0, 0.0, 0.0, -4.0], [0.0, -5.0, 6.0, 0.0]]))
    assert masked == 0.5


def test_wandas_masks_against_a_direct_computation():
    torch.manual_seed(0)
    score = torch.rand(6, 12)
    mask, blocks = pruned_weights(score, 0.4), pruned_two_of_four(score)
    for row in range(6):
        lowest = sorted(range(12), key=lambda j, row=row: score[row, j])[:4]  # int(0.4 * 12)
        assert [bool(mask[row, j]) for j in range(12)] == [j in lowest for j in range(12)]
        for start in range(0, 12, 4):
            lowest = sorted(range(start, start + 4), key=lambda j, row=row: score[row, j])[:2]
            assert [j for j in range(start, start + 4) if blocks[row, j]] == sorted(lowest)


def test_wanda_24_runs_with_two_of_four():
    inputs = [[1.0] * 8]
    weight = [[1.0, 2.0, 3.0, 4.0, 8.0, 7.0, 6.0, 5.0]]
    out, masked, _ = fit("wanda-2:4", inputs, weight)
    torch.testing.assert_close(out, torch.tensor([[3.0 + 4 + 8 + 7]]))
    assert masked == 0.5


def test_fixed_neurons_are_the_same_for_every_token():
    out, masked, _ = fit("fixed-neuron", X, W)  # mean magnitudes 3 4 5 6
    torch.testing.assert_close(out, outputs([[0.0, 0.0, 3.0, -4.0], [0.0, 0.0, -7.0, 8.0]], W))
    assert masked == 0.5


def test_cats_lets_the_gate_decide_and_counts_what_stays_dense():
    model = Decoder(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).tolist(), GatedMLP())
    ids = torch.arange(6)[None]
    sites = find_sites(model, example={"input_ids": ids})
    fitted = get_sparsifier("cats").fit(model, sites, ids, 1 / 3, skip=0)
    counter = SparsityCounter()
    with fitted.attach(model, counter=counter):
        out = model(input_ids=ids).logits[0]
    x, mlp = model.embedding.weight, model.layers[0]
    gate = F.silu(x @ mlp.gate.weight.t())
    tau = gate.abs().flatten().sort().values[23]  # half of the neurons: two of three linears share the third
    expected = (torch.where(gate.abs() > tau, gate, 0) * (x @ mlp.up.weight.t())) @ mlp.down.weight.t()
    torch.testing.assert_close(out, expected)
    assert fitted.masked_share(counter) == pytest.approx(1 / 3)
    assert fitted.modules == ("layers.0.up", "layers.0.down")


def quantile(x, share):
    """The largest of the smallest magnitudes that make up a share of all."""
    return x.abs().flatten().sort().values[round(share * x.numel()) - 1]


def masked(x, threshold):
    return torch.where(x.abs() > threshold, x, 0)


def test_chess_has_a_threshold_for_every_gate_and_masks_queries_and_outputs():
    model = Decoder(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).tolist(), Block())
    ids = torch.arange(6)[None]
    sites = find_sites(model, example={"input_ids": ids})
    # q and o are 32 of the 160 weights, up and down 64: half of each is 0.3 of the model.
    fitted = get_sparsifier("chess").fit(model, sites, ids, 0.3, skip=0)
    counter = SparsityCounter()
    with fitted.attach(model, counter=counter):
        out = model(input_ids=ids).logits[0]
    x, block = model.embedding.weight, model.layers[0]
    attention, mlp = block.self_attn, block.ffn
    inner = attention.q_proj(x) + attention.k_proj(x) + attention.v_proj(x)
    h = attention.o_proj(inner)
    mean = mlp.up(h).abs().mean(0)
    thresholds = quantile(F.silu(mlp.gate(h)) * mean, 0.5) / mean
    torch.testing.assert_close(fitted.thresholds["layers.0.ffn.gate"], thresholds, rtol=0.1, atol=0)
    sparse = attention.q_proj(masked(x, quantile(x, 0.5))) + attention.k_proj(x) + attention.v_proj(x)
    h = attention.o_proj(masked(sparse, quantile(inner, 0.5)))
    gate = masked(F.silu(mlp.gate(h)), thresholds)
    torch.testing.assert_close(out, mlp.down(gate * mlp.up(h)))
    shares = fitted.drops(counter)
    assert (
        set(shares)
        == set(fitted.modules)
        == {
            *(f"layers.0.self_attn.{name}" for name in ("q_proj", "o_proj")),
            *(f"layers.0.ffn.{name}" for name in ("up", "down")),
        }
    )
    off = float((gate == 0).float().mean())
    assert shares["layers.0.ffn.up"] == shares["layers.0.ffn.down"] == pytest.approx(off)
    assert shares["layers.0.self_attn.q_proj"] == 0.5


def distortion(gate, up, norms):
    """Magnitudes of the gates in rising order, and the share of the output's energy that goes with each and before."""
    order = gate.abs().flatten().argsort()
    energy = (gate * up * norms).square().double().flatten()[order]
    return gate.abs().flatten()[order], energy.cumsum(0) / energy.sum()


def test_sats_takes_the_largest_thresholds_within_one_budget(tiny_llama):
    ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    sites = find_sites(tiny_llama)
    fitted = get_sparsifier("sats").fit(tiny_llama, sites, ids, 0.3, skip=0)
    seen = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, y, path=path: seen.update({path: y}))
        for path, module in tiny_llama.named_modules()
        if path.endswith(("gate_proj", "up_proj"))
    ]
    tiny_llama(input_ids=ids)
    for handle in handles:
        handle.remove()
    spent, next_entry, shares = [], [], []
    for mlp in fitted.mlps:
        norms = tiny_llama.get_submodule(mlp.down).weight.norm(dim=0)
        magnitudes, running = distortion(F.silu(seen[mlp.gate]), seen[mlp.up], norms)
        below = int((magnitudes <= fitted.thresholds[mlp.gate]).sum())
        # A bin of the histogram holds several entries, of magnitudes within 1/128.
        near = (magnitudes / fitted.thresholds[mlp.gate] - 1).abs() < 1 / 64
        spent.append(float(running[below - 1 - int(near[:below].sum())]))
        next_entry.append(float(running[below + int(near[below:].sum())]))
        shares.append(below / len(magnitudes))
    assert max(spent) < min(next_entry)  # one budget lies between what all spend and what any would spend next
    assert abs(shares[0] - shares[1]) > 0.01
    counter = SparsityCounter()
    with fitted.attach(tiny_llama, counter=counter):
        tiny_llama(input_ids=ids)
    assert fitted.masked_share(counter) == pytest.approx(0.3, abs=0.01)
    assert set(fitted.modules) == {path for mlp in fitted.mlps for path in (mlp.up, mlp.down)}


def test_sats_meets_the_target_in_the_sparse_model_itself(tiny_llama):
    sites, ids = find_sites(tiny_llama), torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    sats = get_sparsifier("sats")
    statistics = sats.calibrate(tiny_llama, sites, ids)
    # As if the sparse model's gates were larger than those that the curve of the last block knows.
    last = statistics.own["model.layers.1.mlp_out"]
    last.gates.counts = last.gates.counts.roll(-64)
    last.energy = last.energy.roll(-64)
    fitted, counter = sats.at(tiny_llama, statistics, 0.3), SparsityCounter()
    with fitted.attach(tiny_llama, counter=counter):
        tiny_llama(input_ids=ids)
    assert fitted.masked_share(counter) == pytest.approx(0.3, abs=0.002)


@pytest.mark.parametrize("budget", [0.0, 1e-4, 0.03, 0.2, 0.6])
def test_a_distortion_curve_is_that_of_the_sorted_gates(budget):
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(40, 8, generator=generator), torch.randn(40, 8, generator=generator)
    norms = torch.rand(8, generator=generator) + 0.1
    curve = DistortionCurve(norms)
    curve.mlp = SimpleNamespace(activation=nn.Identity())
    for half in (slice(0, 15), slice(15, 40)):
        curve.see_gate(gate[half], None)
        curve.update(gate[half] * up[half])
    magnitudes, running = distortion(gate, up, norms)
    count = int((running <= budget).sum())
    assert count / 320 - 2 / 320 <= curve.share_within(budget) <= (count + 2) / 320
    assert curve.gates.quantile(curve.share_within(budget)) <= float(magnitudes[count]) * (1 + 1 / 64)


def test_acttail_takes_hills_exponent_of_the_larger_half_of_the_spectrum():
    eigenvalues = torch.tensor([1.0, 2.0, 4.0, 8.0, 32.0, 1.5])
    u, _, vh = torch.linalg.svd(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    weight = (u * eigenvalues.sqrt()) @ vh
    expected = 1 + 3 / (math.log(4 / 4) + math.log(8 / 4) + math.log(32 / 4))
    assert tail_exponent(weight) == pytest.approx(expected, rel=1e-4) == tail_exponent(weight.t())
    assert math.isfinite(tail_exponent(torch.eye(4)))


def test_acttail_gives_heavier_tails_less_of_the_target():
    exponents, weights = {"a": 2.0, "b": 3.0, "c": 4.0}, {"a": 1, "b": 2, "c": 1}
    assert allocate(exponents, weights, 0.5) == pytest.approx({"a": 0.4, "b": 0.5, "c": 0.6})
    capped = allocate(exponents, weights, 0.9)
    assert capped["c"] == pytest.approx(0.99) and capped["a"] / capped["b"] == pytest.approx(0.8)
    assert sum(capped[name] * weights[name] for name in weights) == pytest.approx(0.9 * 4)
    assert allocate({"a": 2.0, "b": 2.0}, {"a": 1, "b": 1}, 0.5) == pytest.approx({"a": 0.5, "b": 0.5})


def test_acttail_keeps_each_projections_own_number_of_the_largest():
    # Exponents 1 + 1 / log 1: all of q's eigenvalues are one (light), k's are 1 and 100 (heavy): 0.6 and 0.4.
    q, k = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 0.0], [0.0, 10.0, 0.0, 0.0]]
    k.append([0.0, 0.0, 0.0, 3.0])
    q.append([0.0, 0.0, 0.0, 1.0])
    out, share, _ = fit("acttail", X, q, k)
    one, two = [[0.0, 0.0, 0.0, -4.0], [0.0, 0.0, 0.0, 8.0]], [[0.0, 0.0, 3.0, -4.0], [0.0, 0.0, -7.0, 8.0]]
    torch.testing.assert_close(out, torch.cat([outputs(one, q), outputs(two, k)], dim=1))
    assert share == (0.75 + 0.5) / 2


@pytest.mark.parametrize(
    ("method", "sparsity", "message"),
    [
        ("sats", 0.6, r"sparsity: got 0.6, expected at most 0.4\d+, as sats leaves attention and gates dense"),
        ("chess", 0.7, r"sparsity: got 0.7, expected at most 0.\d+, as chess leaves gates, keys and values dense"),
        ("cats", 0.6, r"sparsity: got 0.6, expected at most 0.4\d+, as cats leaves attention and gates dense"),
        ("wanda-2:4", 0.4, "sparsity: got 0.4, expected 0.5"),
        ("teal", 1.0, r"sparsity: got 1.0, expected a number in \[0, 1\)"),
    ],
    ids=["sats", "chess", "cats", "2:4", "all"],
)
def test_what_cannot_be_reached_is_said(tiny_llama, method, sparsity, message):
    with pytest.raises(SponError, match=message):
        get_sparsifier(method).fit(tiny_llama, find_sites(tiny_llama), torch.ones(1, 8, dtype=torch.long), sparsity)


def test_models_and_methods_that_do_not_fit_are_said():
    model = Decoder(X, Linears(W))
    ids = torch.arange(2)[None]
    sites = find_sites(model, example={"input_ids": ids})
    for method in ("cats", "sats", "chess"):
        with pytest.raises(SponError, match=f"method: got '{method}'.*its blocks have no gated MLP"):
            get_sparsifier(method).fit(model, sites, ids, 0.2, skip=0)
    with pytest.raises(SponError, match="method: got 'tael', expected one of teal, "):
        get_sparsifier("tael")
    assert list(SPARSIFIERS) == [cls().name for cls in SPARSIFIERS.values()]
