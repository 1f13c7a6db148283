# SPDX-License-Identifier: Apache-2.0
"""One value of a `.gguf` file's metadata, found without building the arrays of its vocabulary.

`gguf.GGUFReader` makes an object of every token, which takes seconds for a large vocabulary. The layout is that of
version 2 and 3 of the format: a count, then keys, types and values, all little-endian.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, Any

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_metadata(file: str | Path, key: str) -> Any:
    """A number, truth or string of a `.gguf` file's metadata.

    Args:
        file: the file.
        key: such as ``tokenizer.ggml.add_bos_token``.

    Returns:
        None where the file does not say it, or its value is an array.

    Raises:
        ValueError: the file is not GGUF, or ends within its metadata.
    """
    with open(file, "rb") as stream:
        magic, version, _, count = _unpack(stream, "4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{file}: not a GGUF file of version 2 or 3")
        for _ in range(count):
            name = _string(stream)
            value = _value(stream, _unpack(stream, "I")[0])
            if name == key.encode():
                return value
    return None


def _value(stream: IO[bytes], kind: int) -> Any:
    if kind in _NUMBERS:
        return _unpack(stream, _NUMBERS[kind])[0]
    if kind == _STRING:
        return _string(stream).decode()
    if kind != _ARRAY:
        raise ValueError(f"{stream.name}: a value of GGUF's type {kind}")
    inner, count = _unpack(stream, "IQ")
    if inner in _NUMBERS:
        stream.seek(count * struct.calcsize(_NUMBERS[inner]), 1)
    else:
        for _ in range(count):
            _value(stream, inner)
    return None


def _string(stream: IO[bytes]) -> bytes:
    return _read(stream, _unpack(stream, "Q")[0])


def _unpack(stream: IO[bytes], layout: str) -> tuple[Any, ...]:
    return struct.unpack("<" + layout, _read(stream, struct.calcsize("<" + layout)))


def _read(stream: IO[bytes], size: int) -> bytes:
    found = stream.read(size)
    if len(found) != size:
        raise ValueError(f"{stream.name}: ends within its metadata")
    return found
