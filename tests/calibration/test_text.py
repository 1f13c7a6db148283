# SPDX-License-Identifier: Apache-2.0
"""Windows of text begin as a served prompt begins, and hold the text and nothing else."""

import codecs

import pytest
from tiny_models import make_byte_tokenizer
from tokenizers import processors

from spon_plugin.calibration.text import (
    leading_windows,
    mixed_windows,
    opening,
    opening_text,
    read_text,
    spread_windows,
    token_ids,
)
from spon_plugin.errors import SponError

TEXT = "\n".join(f"Line {number} says nothing much, but it says it." for number in range(600))


def tokenizer_with(before=("<bos>",), after=()):
    tokenizer = make_byte_tokenizer()
    tokenizer.add_tokens([*before, *after], special_tokens=True)
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (*before, *after)]
    template = " ".join([*before, "$A", *after])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


TOKENIZERS = {
    "nothing": ((), ()),
    "bos": (("<bos>",), ()),
    "two": (("<gmask>", "<sop>"), ()),
    "bos and eos": (("<bos>",), ("<eos>",)),
    "eos": ((), ("<eos>",)),
}


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS)
def case(request):
    before, after = request.param
    return tokenizer_with(before, after), before


def test_windows_begin_with_what_a_prompt_begins_with(case):
    tokenizer, before = case
    first = tokenizer.convert_tokens_to_ids(list(before))
    assert opening(tokenizer) == tokenizer("hello")["input_ids"][: len(first)] == first
    assert opening_text(tokenizer) == ("".join(before) or None)
    leading, spread = leading_windows(tokenizer, TEXT, 64, 640), mixed_windows(tokenizer, [TEXT], 64, 8)
    assert leading.shape == (10, 64) and spread.shape == (8, 64)
    for window in (*leading.tolist(), *spread.tolist()):
        assert window[: len(first)] == first
        assert not set(window[len(first) :]) & set(tokenizer.all_special_ids)


def test_consecutive_windows_leave_nothing_of_the_text_out(case):
    tokenizer, before = case
    windows = leading_windows(tokenizer, TEXT, 64)
    body = windows[:, len(before) :].flatten().tolist()
    ids = token_ids(tokenizer, TEXT)
    assert body == ids[: len(body)]
    assert len(ids) - len(body) < 64


def test_a_window_has_room_for_more_than_its_opening():
    with pytest.raises(SponError, match="window: got 2, expected at least 3 tokens"):
        leading_windows(tokenizer_with(("<gmask>", "<sop>")), TEXT, 2)


def test_a_byte_order_mark_is_not_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(codecs.BOM_UTF8 + TEXT.encode())
    assert read_text(file) == TEXT
    file.write_bytes(codecs.BOM_UTF8)
    with pytest.raises(SponError, match="it is empty"):
        read_text(file)


@pytest.mark.parametrize("kind", ["spread", "leading"])
def test_a_long_text_is_tokenized_only_as_far_as_windows_are_taken(kind):
    read = []

    def tokenizer(text, **_):
        read.append(len(text))
        return {"input_ids": [ord(character) % 50 for character in text[::4]]}

    text = "many words of four\n" * 100_000
    if kind == "spread":
        windows = spread_windows(tokenizer, text, 64, 10)
    else:
        windows = leading_windows(tokenizer, text, 64, max_tokens=640)
    assert windows.shape == (10, 64)
    assert sum(read) < 10_000 < len(text) / 100


def test_windows_of_two_offsets_are_apart():
    tokenizer = make_byte_tokenizer()
    text = "".join(f"{number:05d}\n" for number in range(6000))

    def numbers(offset):
        return {
            line for row in spread_windows(tokenizer, text, 60, 8, offset) for line in tokenizer.decode(row).split()
        }

    assert len(numbers(0.0)) == len(numbers(1 / 3)) == 8 * 10
    assert not numbers(0.0) & numbers(1 / 3)
    mixed = mixed_windows(tokenizer, [text], 60, 8, seed=0, offset=1 / 3)
    assert {line for row in mixed for line in tokenizer.decode(row).split()} == numbers(1 / 3)
