# SPDX-License-Identifier: Apache-2.0
"""Adapters that version 0.1 wrote, kept as files: they are read, and written again to the last byte."""

from pathlib import Path

import pytest

from spon_plugin import read_adapter, write_adapter

ADAPTERS = Path(__file__).parents[1] / "data" / "adapters"
DIGESTS = {
    "teal": "8ea054e8250ad4f2ec827a2739332b562a646ac5a8ed36ce39db824abcda94d0",
    "spon": "fc92ca84721b17770565c9a711cf5f255c4cfa95d89b7980c39cd1d9fede7257",
    "sensitivity": "557e2f101444318f2ac002cf2225843a0513aac58969d8e9e414cdb250cbda22",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_an_adapter_of_format_1_is_read_and_written_again_byte_for_byte(name, tmp_path):
    adapter = read_adapter(ADAPTERS / name)
    assert adapter.digest == DIGESTS[name]
    assert adapter.has_alpha == (name != "teal") and bool(adapter.center_modules) == (name == "sensitivity")
    again = write_adapter(adapter, tmp_path / "again")
    for file in sorted((ADAPTERS / name).iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
