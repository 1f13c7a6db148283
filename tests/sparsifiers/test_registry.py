# SPDX-License-Identifier: Apache-2.0
import sys

import pytest
from strangers import NAME, install

from spon_plugin import SponError
from spon_plugin.sparsifiers import SPARSIFIERS, Sparsifier, ThresholdSparsifier, get_sparsifier, method_names
from spon_plugin.sparsifiers.registry import adapter_methods, adapter_sparsifier


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
