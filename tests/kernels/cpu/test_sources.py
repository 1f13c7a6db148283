# SPDX-License-Identifier: Apache-2.0
"""Compiled functions are not those of other sources."""

import pytest

from spon_plugin.kernels.cpu import kernel
from spon_plugin.kernels.cpu.sources import fingerprint


def test_every_file_counts(tmp_path):
    (tmp_path / "first").mkdir()
    seen = {fingerprint(tmp_path / "first")}
    for number, (name, text) in enumerate([("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", "")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_text(text)
        seen.add(fingerprint(folder))
    assert len(seen) == 4


@pytest.mark.skipif(not kernel.is_available(), reason="Numba or GNU's OpenMP is missing")
def test_numba_s_key_holds_it():
    from spon_plugin.kernels.cpu import numba_types, scaled_layout
    from spon_plugin.kernels.cpu.decode_worker import compile_decode_worker
    from spon_plugin.kernels.cpu.scaled_worker import compile_scaled_worker
    from spon_plugin.kernels.cpu.worker import compile_worker

    whole = compile_scaled_worker(scaled_layout.SUM_INT8, numba_types.INT8)
    decoding = compile_decode_worker(numba_types.INT8, True)
    for compiled in (compile_worker(numba_types.FLOAT32), whole, decoding):
        # Numba hashes the values that a function closes over; see numba.core.caching.Cache._index_key.
        assert fingerprint() in [cell.cell_contents for cell in compiled._pyfunc.__closure__]
