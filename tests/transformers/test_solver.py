# SPDX-License-Identifier: Apache-2.0
"""Models that are rounded for the inputs that they get: nearer to the dense model than the nearest values are."""

import json

import pytest
import torch
from tiny_models import make_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from spon_plugin import SponError, sparse_inputs
from spon_plugin.calibration.text import leading_windows, mixed_windows, offline_text
from spon_plugin.decoder.sites import find_sites
from spon_plugin.sparsifiers.calibrate import calibrate
from spon_plugin.studies.evaluation import quality
from spon_plugin.studies.quality import Reference
from spon_plugin.weights import weight_of
from spon_plugin.weights.error_feedback import Moments
from spon_transformers import solver
from spon_transformers.quantize import Rounding, quantize, save_quantized
from spon_transformers.solver import quantize_for_inputs

pytest.importorskip("compressed_tensors", reason="pip install 'spon-plugin[quantize]'")
WINDOWS = torch.randint(0, 60, (24, 32), generator=torch.Generator().manual_seed(1))
ROUNDINGS = {
    "int4": Rounding(4, 32),
    "int4 asymmetric": Rounding(4, 32, symmetric=False),
    "int8": Rounding(8, None),
    "int4 with head": Rounding(4, 32, head=True),
}


def model(dtype=torch.float32):
    return make_tiny_llama(hidden_size=64, intermediate_size=128).to(dtype)


def adapter_of(dense, method="teal"):
    return calibrate(dense, find_sites(dense), WINDOWS[:16], WINDOWS[16:], 0.4, method)


def read_back(rounded, directory):
    """A rounded model as transformers runs it."""
    save_quantized(rounded, directory)
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@torch.no_grad()
def off(rounded, dense, masks):
    """The squared distance of the logits, relative; on tokens that were not read."""
    ids = torch.randint(0, 60, (8, 32), generator=torch.Generator().manual_seed(2))
    with sparse_inputs(rounded, masks):
        logits = rounded(input_ids=ids).logits.float()
    expected = dense(input_ids=ids).logits.float()
    return float((logits - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
@torch.no_grad()
def test_read_back_it_has_the_values_that_were_solved_for(tmp_path, rounding, dtype):
    rounded, seen = model(dtype), []
    adapter = adapter_of(rounded)
    paths = quantize_for_inputs(rounded, rounding, WINDOWS, adapter, progress=lambda *done: seen.append(done))
    assert seen[-1] == (len(paths), len(paths)) and ("lm_head" in paths) == rounding.head
    loaded = read_back(rounded, tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    for path in paths:
        ours, theirs = (weight_of(each.get_submodule(path)).dense() for each in (rounded, loaded))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", ["teal", "sensitivity"])
def test_under_masks_it_is_nearer_to_the_dense_model_than_the_nearest_values(method, tmp_path):
    dense = model()
    adapter = adapter_of(dense, method)
    nearest, solved, blind = model(), model(), model()
    quantize(nearest, Rounding(4, 32))
    quantize_for_inputs(solved, Rounding(4, 32), WINDOWS, adapter)
    quantize_for_inputs(blind, Rounding(4, 32), WINDOWS)
    made = {"nearest": nearest, "solved": solved, "blind": blind}
    nearest, solved, blind = (read_back(each, tmp_path / name) for name, each in made.items())
    assert off(solved, dense, adapter.masks) < 0.8 * off(nearest, dense, adapter.masks)
    assert off(solved, dense, adapter.masks) < off(blind, dense, adapter.masks)
    assert off(blind, dense, {}) < 0.8 * off(nearest, dense, {})


@torch.no_grad()
def test_what_a_linear_is_fitted_to_is_what_the_finished_model_feeds_it(monkeypatch, tmp_path):
    seen, found = [], []

    class Kept(Moments):
        def add(self, reads, exact):
            seen.append(reads)
            super().add(reads, exact)

    monkeypatch.setattr(solver, "Moments", Kept)
    rounded = model()
    adapter = adapter_of(rounded)
    quantize_for_inputs(rounded, Rounding(4, 32), WINDOWS, adapter)
    finished = read_back(rounded, tmp_path / "q")
    last = finished.get_submodule(find_sites(finished)[-1].modules[0])
    with sparse_inputs(finished, adapter.masks):
        handle = last.register_forward_pre_hook(lambda _module, args: found.append(args[0]))
        finished(input_ids=WINDOWS)
        handle.remove()
    torch.testing.assert_close(torch.cat(seen[-3:]), found[0].flatten(0, 1), rtol=1e-3, atol=1e-4)


def test_the_same_text_gives_the_same_codes():
    first, second = model(), model()
    for each in (first, second):
        quantize_for_inputs(each, Rounding(4, 32), WINDOWS)
    assert all(torch.equal(one, other) for one, other in zip(first.buffers(), second.buffers(), strict=True))
    assert not any(module._forward_pre_hooks for module in first.modules())


def test_what_does_not_fit_is_refused_untouched():
    dense, wider = model(), make_tiny_llama(hidden_size=96, intermediate_size=128)
    before = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    with pytest.raises(SponError, match="this model"):
        quantize_for_inputs(wider, Rounding(4, 32), WINDOWS, adapter_of(dense, "sensitivity"))
    with pytest.raises(SponError, match="ridge: got 0"):
        quantize_for_inputs(wider, Rounding(4, 32), WINDOWS, ridge=0)
    with pytest.raises(SponError, match="group: got 7"):
        quantize_for_inputs(wider, Rounding(4, 7), WINDOWS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in wider.state_dict().items())


@pytest.mark.slow
def test_on_a_real_model_it_gives_back_a_third_of_what_rounding_and_masks_take(smollm2_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)

    def load():
        return AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()

    dense, nearest, solved = load(), load(), load()
    train, test = offline_text("train"), leading_windows(tokenizer, offline_text("test"), 128, 1024)
    windows = mixed_windows(tokenizer, [train], 128, 24, 0)
    adapter = calibrate(dense, find_sites(dense), windows[:16], windows[16:], 0.4)
    rounding = Rounding(4, 32, symmetric=False)
    quantize(nearest, rounding)
    quantize_for_inputs(solved, rounding, windows, adapter)
    reference = Reference(dense, test)
    found = {}
    for name, made in (("nearest", nearest), ("solved", solved)):
        each = read_back(made, tmp_path / name)
        with sparse_inputs(each, adapter.masks):
            found[name] = quality(each, test, reference=reference).figures()["kl"]
    assert found["solved"] < found["nearest"] * 2 / 3, found
