# SPDX-License-Identifier: Apache-2.0
"""The study of quantized bases, with rounded weights in place of quantized ones."""

import copy

import pytest
import torch

from spon_plugin import SponError, find_sites, read_adapter
from spon_plugin.studies.ablation import Trial
from spon_plugin.studies.quantized_bases import QuantizedBases, check_adapter, records
from spon_plugin.studies.rows import RowStore
from spon_plugin.training.recipe import Recipe

WINDOWS = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def study(tiny_llama, tmp_path):
    loaded = []

    def load(precision):
        loaded.append(precision)
        model = copy.deepcopy(tiny_llama)
        return model if precision == "float32" else model.to(torch.bfloat16).float()

    made = QuantizedBases(
        load=load,
        weight_bytes=lambda model: 7,
        precisions=["float32", "rounded"],
        trial=Trial(0.5, ("a",), 64, (), Recipe(4, 16, 2, 1, 0.02)),
        pool=WINDOWS[:6],
        tests={"a": WINDOWS[6:]},
        directory=tmp_path,
    )
    return made, loaded


def test_each_base_runs_the_full_adapter_and_its_own(study, tmp_path):
    made, loaded = study
    rows = made.run(RowStore(tmp_path, {}))
    assert [(row["precision"], row["adapter"]) for row in rows] == [
        ("float32", "full"), ("rounded", "full"), ("rounded", "own"),
    ]  # fmt: skip
    assert loaded == ["float32", "rounded"] and all(row["weight_bytes"] == 7 for row in rows)
    full, own = sorted(read_adapter(path).digest for path in tmp_path.glob("adapter-*"))
    assert full != own and len({record["spon"] for record in records(rows)}) == 3
    assert made.run(RowStore(tmp_path, {})) == rows and len(loaded) == 2


def test_rows_without_their_adapter_say_so(study, tmp_path):
    made, _ = study
    made.precisions = ["float32"]
    made.run(RowStore(tmp_path, {}))
    for path in tmp_path.glob("adapter-float32-*/*"):
        path.unlink()
    next(tmp_path.glob("adapter-float32-*")).rmdir()
    made.precisions = ["float32", "rounded"]
    with pytest.raises(SponError, match="output: got .*expected the adapter of the first row"):
        made.run(RowStore(tmp_path, {}))


def test_an_adapter_in_place_of_training_fits_the_study(study, tmp_path, tiny_llama):
    made, _ = study
    made.precisions = ["float32"]
    made.run(RowStore(tmp_path, {}))
    adapter = read_adapter(next(tmp_path.glob("adapter-*")))
    inputs = {path: site.in_features for site in find_sites(tiny_llama) for path in site.modules}
    check_adapter(adapter, inputs, "tiny", 0.5)
    for wrong, sparsity, message in ((adapter.without_alpha(), 0.5, "without alphas"), (adapter, 0.6, "got 0.6")):
        with pytest.raises(SponError, match=message):
            check_adapter(wrong, inputs, "tiny", sparsity)
