# SPDX-License-Identifier: Apache-2.0
"""Where text comes from: files, Hugging Face datasets, or the offline default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spon_plugin.calibration.text import offline_text, read_text
from spon_plugin.errors import SponError

OFFLINE = "pydoc_data.topics"
_DATASET_CHARACTERS = 20_000_000


@dataclass(frozen=True)
class TextSource:
    """A text and the name that the adapter's config and the tables give it."""

    name: str
    text: str


def text_sources(files: Sequence[Path] | None, datasets: Sequence[str] | None, part: str = "all") -> list[TextSource]:
    """Read every text that the user named; the offline default if there is none.

    Args:
        files: text files.
        datasets: ``NAME[:CONFIG][@SPLIT]`` of Hugging Face datasets; the split is ``train`` by default.
        part: of the offline default: ``all``, ``train`` or ``test``.

    Raises:
        SponError: a text is missing, unreadable, empty, or named twice.
    """
    files = files or ()
    sources = [TextSource(name, read_text(file)) for name, file in zip(_names(files), files, strict=True)]
    sources += [TextSource(name, _dataset_text(name)) for name in datasets or ()]
    if not sources:
        sources = [TextSource(OFFLINE if part == "all" else f"{OFFLINE} ({part} part)", offline_text(part))]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise SponError.of("text", name, "each text once")
    return sources


def _names(files: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell the files apart."""
    paths = [file.absolute() for file in files]
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        parts = 1
        while any(other.parts[-parts:] == path.parts[-parts:] for other in others) and parts < len(path.parts):
            parts += 1
        # A file name need not be UTF-8, but what is written with it in it is.
        names.append("/".join(path.parts[-parts:]).encode("utf-8", "backslashreplace").decode())
    return names


def _dataset_text(spec: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SponError.of("dataset", spec, "the datasets package", "pip install datasets") from error
    name, _, split = spec.partition("@")
    name, _, config = name.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        column = "text" if "text" in (rows.column_names or []) else None
        texts, size = [], 0
        for row in rows:
            column = column or next(key for key, value in row.items() if isinstance(value, str))
            texts.append(row[column])
            size += len(row[column])
            if size > _DATASET_CHARACTERS:
                break
    except StopIteration:
        raise SponError.of("dataset", spec, "a data set with a text column") from None
    except Exception as error:  # the library raises many kinds, all of which mean the same to the user
        raise SponError.of("dataset", spec, f"NAME[:CONFIG][@SPLIT] that can be loaded ({error})") from error
    text = "\n\n".join(texts)
    if not text.strip():
        raise SponError.of("dataset", spec, "a data set with text in it")
    return text
