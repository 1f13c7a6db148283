# SPDX-License-Identifier: Apache-2.0
import gguf
import pytest
from transformers import AutoTokenizer

from spon_transformers.gguf_metadata import read_metadata
from spon_transformers.loading import load_tokenizer

PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "a", "b", "ab"]
KEY = "tokenizer.ggml.add_bos_token"


@pytest.fixture
def write(tmp_path):
    """Write the metadata of a tiny Gemma, which says whether texts begin with a token."""

    def written(begins):
        file = tmp_path / "m.gguf"
        writer = gguf.GGUFWriter(file, "gemma3")
        writer.add_block_count(1)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(PIECES)
        writer.add_token_scores([float(-i) for i in range(len(PIECES))])
        writer.add_token_types([3, 3, 3, 2, 1, 1, 1, 1])
        writer.add_pad_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_bos_token_id(2)
        writer.add_unk_token_id(3)
        if begins is not None:
            writer.add_add_bos_token(begins)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    return written


@pytest.mark.parametrize("begins", [True, False, None])
def test_texts_begin_as_the_file_says(write, begins):
    file = write(begins)
    tokenizer = load_tokenizer(str(file))
    ids = tokenizer("ab")["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) is bool(begins)
    tokenizer.save_pretrained(file.parent / "saved")
    assert AutoTokenizer.from_pretrained(file.parent / "saved")("ab")["input_ids"] == ids


def test_values_are_those_of_the_file(write):
    file = write(True)
    reader = gguf.GGUFReader(file)
    for key in ("general.architecture", "gemma3.block_count", "tokenizer.ggml.bos_token_id", KEY):
        assert read_metadata(file, key) == reader.get_field(key).contents()
    assert read_metadata(file, "tokenizer.ggml.tokens") is None and read_metadata(file, "nothing") is None


def test_a_file_that_ends_early_is_named(write):
    file = write(True)
    content = file.read_bytes()
    for size in (0, 10, 30, len(content) // 2):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"m\.gguf: ends within its metadata"):
            read_metadata(file, "nothing")
    file.write_bytes(b"GGML" + content[4:])
    with pytest.raises(ValueError, match="not a GGUF file of version 2 or 3"):
        read_metadata(file, KEY)
