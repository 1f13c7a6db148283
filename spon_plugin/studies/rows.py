# SPDX-License-Identifier: Apache-2.0
"""Rows of a table, each kept as a file as soon as it is measured, so that a long run can go on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from spon_plugin.errors import SponError
from spon_plugin.files import claim, make_directory
from spon_plugin.studies.tables import json_text

SETTINGS = "settings.json"


class RowStore:
    """A directory of rows that were all made under the same settings.

    Args:
        directory: made if it is not there.
        settings: JSON values; whatever changes a row's figures and is not part of its name.

    Attributes:
        directory: of the rows.
        settings: as they are in its file.

    Raises:
        SponError: the directory holds rows that were made under other settings, or a file in it is damaged; or it
            cannot be made.
    """

    def __init__(self, directory: str | Path, settings: Mapping[str, Any]) -> None:
        self.directory = Path(directory)
        self._rows = self.directory / "rows"
        file = self.directory / SETTINGS
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as it will be read back
        if file.is_file():
            kept = _read(file)
            for name in sorted({*self.settings, *kept}):
                if kept.get(name) != self.settings.get(name):
                    expected = f"{kept.get(name)!r}, as for the rows in {directory}"
                    raise SponError.of(name, self.settings.get(name), expected, "Choose another --output.")
        make_directory(self.directory)
        self._rows.mkdir(exist_ok=True)
        if not file.is_file():
            _write(file, self.settings)

    @classmethod
    def of(cls, directory: str | Path) -> RowStore:
        """The rows that are in a directory.

        Raises:
            SponError: there are none, or a file is damaged.
        """
        file = Path(directory) / SETTINGS
        if not file.is_file():
            raise SponError.of("rows", str(directory), f"a directory with rows and their {SETTINGS}")
        return cls(directory, _read(file))

    def has(self, name: str) -> bool:
        """Whether a row was measured."""
        return self._file(name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        """A row that was measured."""
        return _read(self._file(name))

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Keep a row; whole or not at all. Numbers that JSON does not have (NaN, infinity) become null."""
        _write(self._file(name), row)

    def kept(
        self, name: str, measure: Callable[[], Mapping[str, Any]], done: Callable[[dict[str, Any], bool], None]
    ) -> dict[str, Any]:
        """A row, measured unless it is there.

        Args:
            name: of the row.
            measure: gives it.
            done: called with the row, and whether it was there.
        """
        old = self.has(name)
        if not old:
            self.write(name, measure())
        row = self.read(name)
        done(row, old)
        return row

    def taken(
        self, name: str, measure: Callable[[], Mapping[str, Any]], done: Callable[[dict[str, Any], bool], None]
    ) -> dict[str, Any] | None:
        """`kept`, for several processes at once: None where another one is at the row."""
        with ExitStack() as stack:
            try:
                stack.enter_context(claim(self._file(name)))
            except SponError:
                return None
            return self.kept(name, measure, done)

    def all(self) -> list[dict[str, Any]]:
        """Every row, by file name."""
        return [_read(file) for file in sorted(self._rows.glob("*.json"))]

    def _file(self, name: str) -> Path:
        return self._rows / f"{name.replace('/', '_').replace(':', '_')}.json"


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SponError.of("output", str(file), f"JSON as it was written ({error})", "Remove the file.") from error
    if not isinstance(value, dict):
        raise SponError.of("output", str(file), "a JSON object as it was written", "Remove the file.")
    return value


def _write(file: Path, value: Any) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json_text(value), encoding="utf-8")
    temporary.replace(file)
