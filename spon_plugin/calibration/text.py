# SPDX-License-Identifier: Apache-2.0
"""Text to token windows: for calibration and training spread over the whole text, for evaluation from its start.

A window begins with what the tokenizer puts before every text (`opening`), because a served prompt does, too.
"""

from __future__ import annotations

import hashlib
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spon_plugin.errors import SponError

# Characters fetched per wanted token; more than any tokenizer needs for prose, and topped up where it is not enough.
_CHARACTERS_PER_TOKEN = 8
_TEST_EVERY = 5


def offline_text(part: str = "all") -> str:
    """English prose that every Python ships: the language reference, from `pydoc_data.topics` (about 700 kB).

    Args:
        part: ``all``; ``train``, four topics out of five; or ``test``, the fifth.
    """
    topics = sorted(pydoc_data.topics.topics.items())
    wanted = {
        "all": topics,
        "train": [t for index, t in enumerate(topics) if index % _TEST_EVERY],
        "test": topics[::_TEST_EVERY],
    }
    return "\n\n".join(text for _, text in wanted[part])


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file, without the byte order mark that it may begin with.

    Raises:
        SponError: the file cannot be read, is not UTF-8, or holds nothing but white space.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SponError.of("text", str(path), f"a readable text file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SponError.of("text", str(path), f"UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise SponError.of("text", str(path), "a file with text in it; it is empty")
    return text


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text`, without special tokens."""
    # verbose=False: a text longer than the model's context is no mistake here, it is cut into windows.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def opening(tokenizer: Any) -> list[int]:
    """The special tokens that `tokenizer` puts before every text, ``[bos]`` for most that put any.

    Args:
        tokenizer: of transformers.
    """
    plain = token_ids(tokenizer, "a")
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def opening_text(tokenizer: Any) -> str | None:
    """What windows begin with, in words, for whoever reports figures; None where they begin with the text itself."""
    return "".join(tokenizer.convert_ids_to_tokens(opening(tokenizer))) or None


def leading_windows(tokenizer: Any, text: str, length: int, max_tokens: int | None = None) -> Tensor:
    """Consecutive windows from the start of a text, for evaluation.

    Args:
        tokenizer: of transformers.
        text: the text.
        length: tokens per window, with its opening.
        max_tokens: an upper bound on the tokens in all windows; the whole text by default.

    Returns:
        int64 ``[count, length]``; the remainder that fills no window is dropped.

    Raises:
        SponError: the text (or `max_tokens`) is shorter than one window.
    """
    first = opening(tokenizer)
    body = length - len(first)
    if body < 1 or length < 2:
        raise SponError.of("window", length, f"at least {max(2, len(first) + 1)} tokens")
    if max_tokens is not None and max_tokens < length:
        raise SponError.of("max_tokens", max_tokens, f"at least one window of {length} tokens")
    wanted = max_tokens // length * body if max_tokens is not None else None
    # Tokenizers are slow on megabytes, so only a stretch that surely suffices is tokenized.
    stretch = text if wanted is None else text[: wanted * _CHARACTERS_PER_TOKEN]
    ids = token_ids(tokenizer, stretch)
    if wanted is not None and len(ids) < wanted and len(stretch) < len(text):
        ids = token_ids(tokenizer, text)
    count = len(ids[:wanted]) // body
    if count == 0:
        raise SponError.of("text", f"{len(ids)} tokens", f"at least one window of {length} tokens", "Use more text.")
    return torch.tensor([first + ids[i * body : (i + 1) * body] for i in range(count)], dtype=torch.int64)


def spread_windows(tokenizer: Any, text: str, length: int, count: int, offset: float = 0.0) -> Tensor:
    """Windows spread evenly over a text, for calibration and training.

    Each starts at a line or word boundary. A text that is too short for `count` windows apart gives all it has.

    Args:
        tokenizer: of transformers.
        text: the text.
        length: tokens per window, with its opening.
        count: how many windows to take.
        offset: in [0, 1), where in its part of the text each starts: windows of two offsets are apart.

    Returns:
        int64 ``[<= count, length]``.

    Raises:
        SponError: the text is shorter than one window.
    """
    room = len(text) // max(1, count)
    if room < length * _CHARACTERS_PER_TOKEN // 2:
        return leading_windows(tokenizer, text, length)[:count]
    rows = []
    first = opening(tokenizer)
    for index in range(count):
        start = int((index + offset) * room)
        if start:
            start = _boundary(text, start)
        ids = first + token_ids(tokenizer, text[start : start + length * _CHARACTERS_PER_TOKEN])
        if len(ids) >= length:
            rows.append(ids[:length])
    if not rows:
        return leading_windows(tokenizer, text, length)[:count]
    return torch.tensor(rows, dtype=torch.int64)


def _boundary(text: str, start: int) -> int:
    for mark in ("\n", " "):
        at = text.find(mark, start, start + 400)
        if at >= 0:
            return at + 1
    return start


def mixed_windows(
    tokenizer: Any, texts: Sequence[str], length: int, count: int, seed: int = 0, offset: float = 0.0
) -> Tensor:
    """An even mix of several texts, shuffled: `count` windows, as many from each text.

    A text that is too short gives all it has and the others make up for it, so that `count` is met where possible.

    Args:
        tokenizer: of transformers.
        texts: at least one.
        length: tokens per window, with its opening.
        count: windows in all.
        seed: of the order.
        offset: see `spread_windows`.

    Returns:
        int64 ``[<= count, length]``.

    Raises:
        SponError: there is no text, or one is shorter than a window.
    """
    if not texts:
        raise SponError.of("text", "none", "at least one text")
    pools = []
    left = count
    for index, text in enumerate(sorted(texts, key=len)):  # short ones first: their shortfall goes to the longer
        share = -(-left // (len(texts) - index))
        pools.append(spread_windows(tokenizer, text, length, share, offset))
        left -= len(pools[-1])
    windows = torch.cat(pools)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def windows_digest(windows: Tensor) -> str:
    """SHA-256 of token ids, to tell whether two runs read the same text."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
