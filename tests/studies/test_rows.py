# SPDX-License-Identifier: Apache-2.0
"""Rows that are kept: damaged ones are named."""

import pytest

from spon_plugin import SponError
from spon_plugin.studies.rows import RowStore


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"\xff"], ids=["empty", "cut", "list", "not UTF-8"])
@pytest.mark.parametrize("name", ["settings.json", "rows/teal.json"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    store = RowStore(tmp_path / "out", {"seed": 0})
    store.write("teal", {"perplexity": float("nan")})
    assert store.read("teal") == {"perplexity": None} and store.all() == [{"perplexity": None}]
    (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(SponError, match=f"output: got '.*{name}', expected .*JSON.*Remove the file"):
        RowStore(tmp_path / "out", {"seed": 0}).all()
