# SPDX-License-Identifier: Apache-2.0
"""LAMBADA: is the last word of a passage the one that a model finds the most likely, token by token?

The arithmetic is lm-eval's task `lambada_openai`: the passage is split at its last space, the word with that space
before it is right where each of its tokens is the most likely one after those before it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.calibration.text import opening, read_text, token_ids
from spon_plugin.decoder.positions import whole_windows
from spon_plugin.errors import SponError
from spon_plugin.progress import Progress, no_progress
from spon_plugin.studies.bootstrap import Interval, interval
from spon_plugin.studies.quality import Change


@dataclass(frozen=True)
class Passage:
    """A passage as token ids.

    Attributes:
        ids: ``[length]``.
        word: how many of the last ones are the last word.
    """

    ids: Tensor
    word: int


@dataclass(frozen=True)
class LastWords:
    """How many last words a model got right.

    Attributes:
        right: 1 or 0 for each passage, in their order.
    """

    right: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """The share of right ones."""
        return sum(self.right) / len(self.right)

    @property
    def ends(self) -> Interval | None:
        """Its confidence interval, by a bootstrap over passages."""
        return interval(torch.tensor([self.right], dtype=torch.float64), lambda means: means[0])

    def figures(self) -> dict[str, Any]:
        """For a study's row."""
        return {"accuracy": self.accuracy, "interval": self.ends, "passages": len(self.right), "right": [*self.right]}


def read_passages(file: str | Path, count: int) -> list[str]:
    """The first passages of a file of JSON lines with a ``text`` each, as EleutherAI/lambada_openai has them.

    Raises:
        SponError: the file cannot be read, or a line is something else.
    """
    texts: list[str] = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if line.strip() and len(texts) < count:
            try:
                text = str(json.loads(line)["text"])
            except (ValueError, TypeError, KeyError):
                text = ""
            if not all(part.strip() for part in text.rpartition(" ")[::2]):
                expected = 'JSON lines such as {"text": "A passage whose last word is to be guessed"}'
                raise SponError.of("lambada", f"line {number} of {file}", expected)
            texts.append(text)
    return texts


def encode(tokenizer: Any, texts: Sequence[str]) -> list[Passage]:
    """Passages for a model.

    Args:
        tokenizer: of transformers.
        texts: of at least two words each.

    Raises:
        SponError: a passage has no tokens before its last word.
    """
    first = opening(tokenizer)
    passages = []
    for text in texts:
        context = first + token_ids(tokenizer, text.rsplit(" ", 1)[0])
        ids = first + token_ids(tokenizer, text)
        word = len(ids) - len(context)
        if not 0 < word < len(ids):
            raise SponError.of("lambada", text[:40], "a passage with tokens before its last word")
        passages.append(Passage(torch.tensor(ids), word))
    return passages


@torch.no_grad()
def last_words(
    model: nn.Module, passages: Sequence[Passage], batch_size: int = 8, progress: Progress = no_progress
) -> LastWords:
    """Which last words `model`, as it is now, gets right.

    Args:
        model: causal; maps ``input_ids=`` to an object with ``logits``.
        passages: from `encode`.
        batch_size: passages per forward pass, those of like length together; shorter ones are filled up at their end.
        progress: called after each pass.
    """
    device = next(model.parameters()).device
    right = [0] * len(passages)
    order = sorted(range(len(passages)), key=lambda index: len(passages[index].ids))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        inputs = [passages[index].ids[:-1] for index in indices]
        ids = nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(device)
        with whole_windows():
            logits = model(input_ids=ids).logits
        for row, index in enumerate(indices):
            passage = passages[index]
            end = len(passage.ids) - 1
            guessed = logits[row, end - passage.word : end].argmax(-1).cpu()
            right[index] = int(torch.equal(guessed, passage.ids[-passage.word :]))
        progress(start + len(indices), len(order))
    return LastWords(tuple(right))


def change(before: Sequence[int], after: Sequence[int]) -> Change:
    """The difference in accuracy between two models on the same passages, with a paired interval.

    Args:
        before: `LastWords.right` of one.
        after: of the other.
    """
    means = torch.tensor([[*before], [*after]], dtype=torch.float64)
    return Change(float((means[1] - means[0]).mean()), interval(means, lambda drawn: drawn[1] - drawn[0]))
