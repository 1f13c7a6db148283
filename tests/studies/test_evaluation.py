# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch.nn import functional as F

from spon_plugin import SponError, find_sites, sparse_inputs
from spon_plugin.calibration.text import leading_windows, mixed_windows, offline_text, read_text, spread_windows
from spon_plugin.decoder.masked_linears import MaskedLinears
from spon_plugin.sparsifiers import get_sparsifier
from spon_plugin.sparsifiers.calibrate import calibrate
from spon_plugin.studies.evaluation import dense_prefix_of, evaluate, evaluate_variants, perplexity, share_recovered

PROSE = "".join(f"Line {i} of a text that says little.\n" for i in range(400))


def test_leading_windows_are_the_start_of_the_text(byte_tokenizer):
    windows = leading_windows(byte_tokenizer, PROSE, 16, 50)
    assert windows.shape == (3, 16)
    assert byte_tokenizer.decode(windows.flatten()) == PROSE[:48]
    assert leading_windows(byte_tokenizer, PROSE, 16).numel() == len(PROSE) // 16 * 16


def test_spread_windows_cover_the_whole_text_from_line_starts(byte_tokenizer):
    windows = spread_windows(byte_tokenizer, PROSE, 16, 10)
    texts = [byte_tokenizer.decode(row) for row in windows]
    assert len(texts) == 10 and all(text.startswith("Line ") for text in texts)
    assert [int(text.split()[1]) // 40 for text in texts] == pytest.approx(range(10), abs=1)


def test_a_mix_is_even_seeded_and_makes_up_for_a_short_text(byte_tokenizer):
    other = "x" * 100_000
    windows = mixed_windows(byte_tokenizer, [PROSE, other], 16, 20)
    x = byte_tokenizer("x")["input_ids"][0]
    assert sum(bool((row == x).all()) for row in windows) == 10
    assert torch.equal(windows, mixed_windows(byte_tokenizer, [PROSE, other], 16, 20))
    assert not torch.equal(windows, mixed_windows(byte_tokenizer, [PROSE, other], 16, 20, seed=1))
    assert len(mixed_windows(byte_tokenizer, ["y" * 32, other], 16, 20)) == 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda t: leading_windows(t, "short", 16), "text: got '5 tokens', expected .* 16", id="short"),
        pytest.param(lambda t: spread_windows(t, "short", 16, 4), "text: got '5 tokens'", id="short-spread"),
        pytest.param(lambda t: leading_windows(t, PROSE, 16, 8), "max_tokens: got 8", id="max-tokens"),
        pytest.param(lambda t: leading_windows(t, PROSE, 1), "window: got 1", id="window"),
        pytest.param(lambda t: mixed_windows(t, [], 16, 4), "text: got 'none'", id="none"),
    ],
)
def test_text_that_does_not_fill_a_window_is_named(byte_tokenizer, call, message):
    with pytest.raises(SponError, match=message):
        call(byte_tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b" \n", "it is empty"), (b"\xff\xfe", "expected UTF-8 text")],
    ids=["missing", "empty", "not-utf8"],
)
def test_an_unreadable_file_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(SponError, match=rf"text: got '.*a.txt'.*{message}"):
        read_text(tmp_path / "a.txt")


def test_the_offline_text_has_parts_that_do_not_overlap():
    whole, train, test = (offline_text(part) for part in ("all", "train", "test"))
    assert len(train) + len(test) == pytest.approx(len(whole), abs=10)
    assert len(test) > 50_000
    assert test[:2000] not in train


def ids() -> torch.Tensor:
    return torch.randint(0, 256, (5, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("protocol", "first"), [("all", 0), ("all-but-first", 0), ("last-half", 16)])
def test_perplexity_is_the_exponential_of_the_mean_loss(tiny_llama, protocol, first):
    logits = tiny_llama(input_ids=ids()).logits[:, first:-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids()[:, first + 1 :].flatten())
    assert perplexity(tiny_llama, ids(), protocol, batch_size=2) == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize(
    ("protocol", "own", "prefix"), [("all", 0, 0), ("all", 3, 3), ("all-but-first", 3, 1), ("last-half", 3, 16)]
)
def test_evaluation_masks_what_the_protocol_says(tiny_llama, protocol, own, prefix):
    sites = find_sites(tiny_llama)
    adapter = calibrate(tiny_llama, sites, ids(), ids(), 0.5, alpha="mean", dense_prefix=own)
    result = evaluate_variants(tiny_llama, adapter, ids(), protocol)
    with sparse_inputs(tiny_llama, adapter.masks, prefix):
        assert result.perplexity["spon"] == pytest.approx(perplexity(tiny_llama, ids(), protocol))
    assert result.perplexity["dense"] == pytest.approx(perplexity(tiny_llama, ids(), protocol))
    dense, teal, spon = (result.perplexity[k] for k in ("dense", "teal", "spon"))
    assert result.recovered == share_recovered(dense, teal, spon)
    assert result.sparsity["target"] == 0.5 and result.sparsity["achieved"] == pytest.approx(0.5, abs=0.05)
    assert result.tokens == 160 and result.window == 32 and result.protocol == protocol


def test_an_adapter_is_evaluated_as_the_method_that_made_it(tiny_llama):
    fitted = get_sparsifier("teal").fit(tiny_llama, find_sites(tiny_llama, ["down_proj", "o_proj"]), ids(), 0.5)
    alphas = {path: torch.randn(site.in_features) for path, site in fitted.site_of.items()}
    linears = MaskedLinears.of(tiny_llama, fitted.adapter(alphas).masks)
    assert evaluate(tiny_llama, linears, ids(), alphas=linears.alphas) == evaluate(
        tiny_llama, fitted, ids(), alphas=alphas
    )
    assert evaluate(tiny_llama, None, ids()).masked is None


def test_an_adapter_without_alpha_has_no_spon_row(tiny_llama):
    sites = find_sites(tiny_llama)
    adapter = calibrate(tiny_llama, sites, ids(), ids(), 0.5)
    result = evaluate_variants(tiny_llama, adapter, ids(), known={"dense": 12.5})
    assert set(result.perplexity) == {"dense", "teal"} and result.perplexity["dense"] == 12.5
    assert result.recovered is None


def test_an_unknown_protocol_is_named():
    with pytest.raises(SponError, match="protocol: got 'first-half', expected one of all, last-half, all-but-first"):
        dense_prefix_of("first-half", 32)


def test_a_perplexity_beyond_any_number_is_infinite(tiny_llama):
    with torch.no_grad():
        tiny_llama.lm_head.weight *= 1e6
    assert perplexity(tiny_llama, torch.arange(32).view(2, 16)) == float("inf")
