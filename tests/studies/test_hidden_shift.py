# SPDX-License-Identifier: Apache-2.0
"""Hidden-state shift and alpha statistics, against their formulas written out."""

import sys

import pytest
import torch

from spon_plugin import Mask, SponError, find_sites, sparse_inputs, sparsify
from spon_plugin.adapter.adapter import Adapter
from spon_plugin.adapter.config import SponFields
from spon_plugin.studies.alpha_statistics import alpha_statistics
from spon_plugin.studies.hidden_shift import block_outputs, linear_cka, project, prompt_means, relative_distance


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize(("tokens", "features"), [(40, 6), (5, 12)], ids=["more-tokens", "more-features"])
def test_cka_is_its_formula(tokens, features):
    torch.manual_seed(0)
    x, y = torch.randn(tokens, features) + 3, torch.randn(tokens, 2 * features)
    centred_x, centred_y = (part.double() - part.double().mean(0) for part in (x, y))
    cross = (centred_y.t() @ centred_x).norm() ** 2
    expected = cross / ((centred_x.t() @ centred_x).norm() * (centred_y.t() @ centred_y).norm())
    assert linear_cka(x, y) == pytest.approx(float(expected), rel=1e-9)


def test_cka_sees_neither_rotation_nor_scale_nor_shift():
    torch.manual_seed(0)
    x = torch.randn(30, 8, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    assert linear_cka(x, 5 * x @ rotation + 7) == pytest.approx(1.0)
    assert linear_cka(x, torch.randn(30, 8)) < 0.5
    assert linear_cka(x, torch.ones(30, 8)) == 0.0


def test_relative_distance_is_a_mean_over_tokens():
    dense = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert relative_distance(torch.tensor([[3.0, 5.0], [0.0, 0.0]]), dense) == pytest.approx((1 / 5 + 1) / 2)


def test_block_outputs_are_the_models_hidden_states(tiny_llama):
    texts = prompts(5, 9)
    outputs = block_outputs(tiny_llama, texts, skip=2)
    assert [tuple(part.shape) for part in outputs] == [(3 + 7, 48)] * 2
    hidden = [tiny_llama(input_ids=ids[None], output_hidden_states=True).hidden_states for ids in texts]
    # The last of the model's hidden states comes after its final norm.
    torch.testing.assert_close(outputs[0], torch.cat([states[1][0, 2:] for states in hidden]))
    means = prompt_means(outputs[0], [3, 7])
    torch.testing.assert_close(means[1], hidden[1][1][0, 2:].mean(0))


def test_block_outputs_under_masks_differ_and_leave_no_hooks(tiny_llama):
    texts = prompts(8)
    masks = {path: Mask(torch.tensor([0.5])) for site in find_sites(tiny_llama) for path in site.modules}
    dense = block_outputs(tiny_llama, texts)
    with sparse_inputs(tiny_llama, masks, dense_prefix=1):
        sparse = block_outputs(tiny_llama, texts)
    assert relative_distance(sparse[1], dense[1]) > 0.05
    torch.testing.assert_close(block_outputs(tiny_llama, texts)[1], dense[1], rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [(), (4, 1)], ids=["none", "too-short"])
def test_prompts_must_have_a_token_to_look_at(tiny_llama, lengths):
    with pytest.raises(SponError, match="prompts: got"):
        block_outputs(tiny_llama, prompts(*lengths), skip=1)


def test_pca_keeps_the_distances_of_flat_points():
    torch.manual_seed(0)
    flat = torch.randn(12, 2) @ torch.randn(2, 7)
    places = project(flat, "pca")
    torch.testing.assert_close(torch.cdist(places, places), torch.cdist(flat, flat), rtol=1e-4, atol=1e-4)


def test_tsne_is_reproducible():
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install scikit-learn")
    torch.manual_seed(0)
    points = torch.randn(12, 5)
    first = project(points, "tsne", seed=3)
    assert first.shape == (12, 2)
    torch.testing.assert_close(project(points, "tsne", seed=3), first, rtol=0, atol=0)


def test_tsne_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(SponError, match=r"pip install scikit-learn, or use pca"):
        project(torch.randn(4, 2), "tsne")
    with pytest.raises(SponError, match="expected one of tsne, pca"):
        project(torch.randn(4, 2), "umap")


@pytest.mark.parametrize("centred", [False, True], ids=["no-centre", "centre"])
def test_alpha_statistics_are_their_formulas(tiny_llama, centred):
    sites = find_sites(tiny_llama, ["down_proj"])
    paths = [path for site in sites for path in site.modules]
    torch.manual_seed(1)
    center = torch.full((96,), 0.1) if centred else None
    masks = {path: Mask(torch.tensor([0.4]), center, torch.randn(96)) for path in paths}
    adapter = Adapter(SponFields(dense_prefix=1), masks)
    texts = prompts(6, 4)
    seen: list[torch.Tensor] = []
    handle = tiny_llama.get_submodule(paths[1]).register_forward_pre_hook(lambda _m, args: seen.append(args[0][0, 1:]))
    row = alpha_statistics(tiny_llama, adapter, sites, texts)[1]
    handle.remove()
    x, weight, alpha = torch.cat(seen), tiny_llama.get_submodule(paths[1]).weight, masks[paths[1]].alpha
    assert row.module == paths[1] and row.role == sites[1].role and x.shape == (8, 96)
    assert row.norm == pytest.approx(float(alpha.norm()), rel=1e-5)
    assert row.rms_to_threshold == pytest.approx(float(alpha.square().mean().sqrt()) / 0.4, rel=1e-5)
    assert row.largest_to_threshold == pytest.approx(float(alpha.abs().max()) / 0.4, rel=1e-5)
    assert row.bias_norm == pytest.approx(float((weight @ alpha).norm()), rel=1e-4)
    energy = float((weight @ alpha).square().sum() / (x @ weight.t()).square().sum(1).mean())
    assert row.energy == pytest.approx(energy, rel=1e-4)
    missing = (x - sparsify(x, masks[paths[1]].threshold, None, center)).mean(0)
    cosine = float(torch.dot(missing, alpha) / (missing.norm() * alpha.norm()))
    assert row.mean_error_cosine == pytest.approx(cosine, abs=1e-5)
