# SPDX-License-Identifier: Apache-2.0
"""The methods by name: those of this package, one row each, and those that other packages bring.

A package brings a method by an entry point of the group `GROUP`, ``name = "package.module:Class"``, whose class derives
from `Sparsifier`, or from `ThresholdSparsifier` if adapters can hold it; then every command and host has the method.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from spon_plugin.errors import SponError
from spon_plugin.sparsifiers.acttail import ActTail
from spon_plugin.sparsifiers.base import Sparsifier
from spon_plugin.sparsifiers.cats import Cats
from spon_plugin.sparsifiers.chess import Chess
from spon_plugin.sparsifiers.fixed_neuron import FixedNeuron
from spon_plugin.sparsifiers.larosa import Larosa
from spon_plugin.sparsifiers.rsparse import RSparse
from spon_plugin.sparsifiers.sats import Sats
from spon_plugin.sparsifiers.scap import Scap
from spon_plugin.sparsifiers.sensitivity import Sensitivity
from spon_plugin.sparsifiers.teal import Teal, TealGreedy
from spon_plugin.sparsifiers.thresholds import ThresholdSparsifier
from spon_plugin.sparsifiers.topk import TopK
from spon_plugin.sparsifiers.wanda import Wanda, Wanda24
from spon_plugin.sparsifiers.wina import Wina

GROUP = "spon.sparsifiers"

SPARSIFIERS: dict[str, type[Sparsifier]] = {
    cls.name: cls
    for cls in (
        Teal,
        TealGreedy,
        Sensitivity,
        Wina,
        Scap,
        Cats,
        Sats,
        Chess,
        TopK,
        ActTail,
        Larosa,
        RSparse,
        Wanda,
        Wanda24,
        FixedNeuron,
    )
}
"""The methods of this package, in the order of tables."""


def method_names() -> list[str]:
    """Every method that can be asked for; those of other packages last. Imports none of these."""
    return [*SPARSIFIERS, *sorted(_brought())]


def get_sparsifier(name: str) -> Sparsifier:
    """The method of that name, or of ``name:parameter`` (`Sparsifier.of`).

    Raises:
        SponError: there is none, it has no such parameter, or the package that brings it is broken.
    """
    if name in SPARSIFIERS:
        return SPARSIFIERS[name]()
    if (plain := plain_name(name)) in SPARSIFIERS:
        return SPARSIFIERS[plain].of(name[len(plain) + 1 :])
    brought = _brought().get(name)
    if brought is None:
        raise SponError.of("method", name, "one of " + ", ".join(method_names()))
    source = f"{GROUP}: {name} = {brought.value}"
    try:
        cls = brought.load()
    except Exception as error:  # whatever a foreign module raises
        problem = f"{type(error).__name__}: {error}"
        raise SponError.of(source, problem, "an entry point that loads", "Reinstall the package it is in.") from error
    if not (isinstance(cls, type) and issubclass(cls, Sparsifier)):
        raise SponError.of(source, cls, "a class that derives from spon_plugin.sparsifiers.Sparsifier")
    sparsifier = cls()
    if getattr(sparsifier, "name", None) != name:
        raise SponError.of(f"{source}: name", getattr(sparsifier, "name", None), repr(name))
    return sparsifier


def plain_name(name: str) -> str:
    """The name of a method without its parameter."""
    return name if name in SPARSIFIERS else name.partition(":")[0]


def adapter_methods() -> list[str]:
    """The names of the methods of this package that adapters can hold."""
    return [name for name, cls in SPARSIFIERS.items() if issubclass(cls, ThresholdSparsifier)]


def adapter_sparsifier(name: str) -> ThresholdSparsifier:
    """The method of that name, for an adapter.

    Raises:
        SponError: there is none, or it does more than mask inputs by thresholds.
    """
    sparsifier = get_sparsifier(name)
    if not isinstance(sparsifier, ThresholdSparsifier):
        expected = "one that masks inputs by thresholds: " + ", ".join(adapter_methods())
        raise SponError.of("method", name, expected, "The others are for evaluation: spon compare.")
    return sparsifier


def _brought() -> dict[str, EntryPoint]:
    """The entry points of other packages, less those that bear the name of a method of ours."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in SPARSIFIERS}
