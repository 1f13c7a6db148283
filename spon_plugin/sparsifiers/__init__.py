# SPDX-License-Identifier: Apache-2.0
"""Sparsification methods behind one interface: calibrate once, fit at any sparsity, run with or without alpha."""

from __future__ import annotations

from spon_plugin.errors import SponError
from spon_plugin.sparsifiers.base import Fitted, Sparsifier, Statistics
from spon_plugin.sparsifiers.cats import Cats
from spon_plugin.sparsifiers.fixed_neuron import FixedNeuron
from spon_plugin.sparsifiers.larosa import Larosa
from spon_plugin.sparsifiers.rsparse import RSparse
from spon_plugin.sparsifiers.scap import Scap
from spon_plugin.sparsifiers.sensitivity import Sensitivity
from spon_plugin.sparsifiers.teal import Teal, TealGreedy
from spon_plugin.sparsifiers.topk import TopK
from spon_plugin.sparsifiers.wanda import Wanda, Wanda24
from spon_plugin.sparsifiers.wina import Wina

SPARSIFIERS: dict[str, type[Sparsifier]] = {
    cls.name: cls
    for cls in (
        Teal,
        TealGreedy,
        Sensitivity,
        Wina,
        Scap,
        Cats,
        TopK,
        Larosa,
        RSparse,
        Wanda,
        Wanda24,
        FixedNeuron,
    )
}


def get_sparsifier(name: str) -> Sparsifier:
    """The method of that name.

    Raises:
        SponError: there is none.
    """
    if name not in SPARSIFIERS:
        raise SponError.of("method", name, "one of " + ", ".join(SPARSIFIERS))
    return SPARSIFIERS[name]()


__all__ = ["SPARSIFIERS", "Fitted", "Sparsifier", "Statistics", "get_sparsifier"]
