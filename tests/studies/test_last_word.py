# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from tiny_models import make_byte_tokenizer

from spon_plugin import SponError, find_sites
from spon_plugin.sparsifiers import get_sparsifier
from spon_plugin.sparsifiers.calibrate import calibrate
from spon_plugin.studies.bench import Bench
from spon_plugin.studies.evaluation import evaluate_last_words
from spon_plugin.studies.last_word import LastWords, Passage, change, encode, last_words, read_passages

TEXTS = ["a b", "The quick brown fox jumps over the dog", "one two three four five", "x y z", "so it goes on"]
IDS = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def one_by_one(model, passages):
    """Greedy decoding of each alone, token by token, the text's own tokens before each."""
    right = []
    for passage in passages:
        guessed = []
        for place in range(len(passage.ids) - passage.word, len(passage.ids)):
            guessed.append(int(model(input_ids=passage.ids[None, :place]).logits[0, -1].argmax()))
        right.append(int(guessed == passage.ids[-passage.word :].tolist()))
    return tuple(right)


@torch.no_grad()
def passages_half_right(model):
    """Random beginnings, of which every second goes on as the model would."""
    made = []
    for index in range(9):
        ids = IDS[index % 8, : 4 + index].tolist()
        for _ in range(2):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if index % 2:
            ids[-1 - index % 3 // 2] ^= 1
        made.append(Passage(torch.tensor(ids), 2))
    return made


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_word_is_right_if_all_of_its_tokens_are(tiny_llama, batch_size):
    passages = passages_half_right(tiny_llama)
    found = last_words(tiny_llama, passages, batch_size)
    assert found.right == one_by_one(tiny_llama, passages) == (1, 0, 1, 0, 1, 0, 1, 0, 1)
    assert found.accuracy == pytest.approx(5 / 9) and found.ends[0] < 5 / 9 < found.ends[1]


def test_passages_are_split_at_their_last_space(byte_tokenizer):
    passages = encode(byte_tokenizer, TEXTS)
    assert [byte_tokenizer.decode(p.ids[-p.word :]) for p in passages] == [" b", " dog", " five", " z", " on"]
    assert [byte_tokenizer.decode(p.ids) for p in passages] == TEXTS


@torch.no_grad()
def guessable(model, tokenizer):
    """Texts whose last word, a letter, the model guesses: those of many beginnings after which it has a space."""
    letters = torch.tensor(tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"])
    begun = letters[torch.randint(26, (8000, 4), generator=torch.Generator().manual_seed(0))]
    (space,) = tokenizer(" ")["input_ids"]
    begun = begun[model(input_ids=begun).logits[:, -1].argmax(-1) == space]
    begun = torch.cat([begun, torch.full((len(begun), 1), space)], 1)
    words = model(input_ids=begun).logits[:, -1].argmax(-1)
    plain = (words > 8) & (words != space) & (words < 90)  # one byte each, none of which is white space
    return tokenizer.batch_decode(torch.cat([begun, words[:, None]], 1)[plain])


def test_lm_evals_task_says_the_same(tiny_llama):
    """Its own model and its own way of cutting requests, on the same passages."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = make_byte_tokenizer()
    texts = [*TEXTS, *guessable(tiny_llama, tokenizer)]
    requests = [
        Instance("loglikelihood", {}, (" ".join(text.split(" ")[:-1]), " " + text.split(" ")[-1]), index)
        for index, text in enumerate(texts)
    ]
    own = last_words(tiny_llama, encode(tokenizer, texts)).right
    model = HFLM(pretrained=tiny_llama, tokenizer=tokenizer, batch_size=2, prefix_token_id=0)
    assert own == tuple(int(greedy) for _, greedy in model.loglikelihood(requests))
    assert sum(own[len(TEXTS) :]) >= 3


def test_masks_are_on(tiny_llama):
    passages = passages_half_right(tiny_llama)
    adapter = calibrate(tiny_llama, find_sites(tiny_llama), IDS, IDS, 0.6, alpha="mean")
    found = evaluate_last_words(tiny_llama, adapter, passages)
    assert set(found) == {"dense", "teal", "spon"} and found["dense"].accuracy == pytest.approx(5 / 9)
    assert found["teal"].right != found["dense"].right
    assert set(evaluate_last_words(tiny_llama, adapter.without_alpha(), passages)) == {"dense", "teal"}
    bench = Bench(model=tiny_llama, sites=find_sites(tiny_llama), tests={}, passages=passages)
    fitted = get_sparsifier("teal").fit(tiny_llama, bench.sites, IDS, 0.6)
    assert bench.last_words(None, "dense")["last_word"]["right"] == list(found["dense"].right)
    with fitted.attach(tiny_llama):
        wanted = list(one_by_one(tiny_llama, passages))
    assert bench.last_words(fitted, "teal")["last_word"]["right"] == wanted


def test_differences_are_paired():
    before, after = [1, 0] * 30, [1, 1] * 6 + [1, 0] * 24
    assert change(before, after).certain and change(before, after).value == pytest.approx(0.1)
    assert not change(before, [0, *before[1:]]).certain
    assert LastWords(tuple(before)).figures()["passages"] == 60


@pytest.mark.parametrize("line", ["not json", '{"context": "a b"}', '{"text": "word"}', '{"text": "ends "}', "[1]"])
def test_a_line_that_is_no_passage_is_named(tmp_path, line):
    (tmp_path / "l.jsonl").write_text(json.dumps({"text": "a b"}) + f"\n\n{line}\n")
    with pytest.raises(SponError, match="lambada: got 'line 3 of "):
        read_passages(tmp_path / "l.jsonl", 2)
    assert read_passages(tmp_path / "l.jsonl", 1) == ["a b"]
