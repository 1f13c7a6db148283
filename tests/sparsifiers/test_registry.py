# SPDX-License-Identifier: Apache-2.0
import sys

import pytest
import torch
from strangers import NAME, install

from spon_plugin import SponError, find_sites
from spon_plugin.sparsifiers import SPARSIFIERS, Sparsifier, ThresholdSparsifier, get_sparsifier, method_names
from spon_plugin.sparsifiers.registry import adapter_methods, adapter_sparsifier, plain_name


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Installs the package for the length of a test."""

    def bring(**changes):
        monkeypatch.syspath_prepend(install(tmp_path / "site", **changes))
        monkeypatch.delitem(sys.modules, "a_stranger", raising=False)

    yield bring
    sys.modules.pop("a_stranger", None)


def test_a_method_of_another_package_is_known_by_its_name(stranger):
    assert NAME not in method_names()
    stranger()
    assert method_names() == [*SPARSIFIERS, NAME] and "a_stranger" not in sys.modules
    assert isinstance(adapter_sparsifier(NAME), ThresholdSparsifier)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"module": "raise OSError('no library')"}, "OSError: no library.*Reinstall the package"),
        ({"target": "a_stranger:Missing"}, "AttributeError"),
        ({"target": "pathlib:Path"}, "expected a class that derives from spon_plugin.sparsifiers.Sparsifier"),
        ({"name": "other"}, "name: got 'half-channel', expected 'other'"),
    ],
    ids=["import-fails", "no-such-class", "another-class", "another-name"],
)
def test_a_broken_package_is_named(stranger, changes, message):
    stranger(**changes)
    with pytest.raises(SponError, match=message):
        get_sparsifier(changes.get("name", NAME))


def test_ours_cannot_be_replaced(stranger):
    stranger(name="teal")
    assert get_sparsifier("teal").__class__ is SPARSIFIERS["teal"] and method_names() == list(SPARSIFIERS)


def test_a_method_for_evaluation_makes_no_adapter():
    assert adapter_methods() == ["teal", "teal-greedy", "sensitivity", "wina", "scap", "rsparse"]
    with pytest.raises(SponError, match="method: got 'topk', expected one that masks inputs by thresholds: teal, "):
        adapter_sparsifier("topk")
    assert all(issubclass(cls, Sparsifier) and cls.name == name for name, cls in SPARSIFIERS.items())


@pytest.mark.parametrize("name", SPARSIFIERS)
def test_every_method_is_known_by_its_name(name):
    assert get_sparsifier(name).name == name and plain_name(name) == name


def test_sensitivity_takes_a_blend_by_name(tiny_llama):
    windows = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    uniform, half, full = (
        get_sparsifier(name).fit(tiny_llama, find_sites(tiny_llama), windows, 0.5)
        for name in ("sensitivity:0", "sensitivity", "sensitivity:1.0")
    )
    assert [fitted.name for fitted in (uniform, half, full)] == ["sensitivity:0", "sensitivity", "sensitivity:1"]
    assert plain_name(full.name) == "sensitivity" and get_sparsifier("sensitivity:0.5").name == "sensitivity"
    spread = [
        sum(float(mask.threshold.log().std()) for mask in fitted.masks.values()) for fitted in (uniform, half, full)
    ]
    assert spread[0] < 1e-3 and spread[1] == pytest.approx(spread[2] / 2, rel=1e-3)
    adapter = full.adapter()
    assert adapter.fields.allocation == "sensitivity"


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "no number": ("sensitivity:much", "with a number from 0 to 1"),
        "too much": ("sensitivity:1.5", "with a number from 0 to 1"),
        "nothing": ("sensitivity:", "with a number from 0 to 1"),
        "not this one": ("teal:0.5", "teal alone"),
        "unknown": ("nothing:0.5", "one of teal"),
    }.values(),
)
def test_a_parameter_that_a_method_has_not_is_refused(name, message):
    with pytest.raises(SponError, match=message):
        get_sparsifier(name)
