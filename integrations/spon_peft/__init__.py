# SPDX-License-Identifier: Apache-2.0
"""SPON as a PEFT method. Importing this package registers it; with the package installed, importing peft does.

`SponTrainer` is imported on first use, because it brings `transformers.Trainer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spon_peft.adapters import collect_adapter
from spon_peft.config import SponConfig
from spon_peft.layer import SponLayer
from spon_peft.linear import SponLinear
from spon_peft.model import SponModel
from spon_peft.registration import register

if TYPE_CHECKING:
    from spon_peft.trainer import SponTrainer

__all__ = [
    "SponConfig",
    "SponLayer",
    "SponLinear",
    "SponModel",
    "SponTrainer",
    "collect_adapter",
    "register",
]

register()


def __getattr__(name: str) -> Any:
    if name == "SponTrainer":
        from spon_peft.trainer import SponTrainer

        return SponTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
