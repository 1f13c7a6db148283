# SPDX-License-Identifier: Apache-2.0
"""The model that a command works on, and what its adapter calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spon_cli.output import note
from spon_plugin import Adapter, Site, SponError, find_sites, machine
from spon_plugin.calibration.text import opening_text


@dataclass
class Loaded:
    """A model with what the commands need of it.

    Attributes:
        name: as the user gave it.
        dtype: what the model computes in.
    """

    name: str
    dtype: str
    model: Any
    tokenizer: Any
    sites: list[Site]

    def follow_machine(self) -> None:
        """Compute in float32 from here on if the machine emulates the model's dtype."""
        from spon_transformers.loading import follow_machine

        self.model = follow_machine(self.model)
        self.dtype = machine.name_of(self.model.dtype)

    @property
    def opening(self) -> str | None:
        """What its windows of text begin with, ``<s>`` for Llama; None where that is the text itself."""
        return opening_text(self.tokenizer)


def load(name: str, dtype: str, target_modules: Sequence[str] | None = None, precision: str | None = None) -> Loaded:
    """Load a model and its tokenizer and find its input sites.

    Args:
        name: as the user gave it.
        dtype: of the weights; ``auto`` follows the machine, see `spon_transformers.loading.load_model`.
        target_modules: names of the linears to sparsify; all by default.
        precision: quantizes the linears, see `load_precision`.

    Raises:
        SponError: the model cannot be loaded, or a target is not one of its linears.
    """
    from transformers.utils import logging

    from spon_transformers.loading import load_model, load_tokenizer
    from spon_transformers.precision import load_precision

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # ours say what is going on
    tokenizer = load_tokenizer(name)
    model = load_model(name, dtype) if precision is None else load_precision(name, precision, dtype)
    kept = getattr(model.config, "dtype", None)
    if dtype == "auto" and isinstance(kept, torch.dtype) and not machine.is_native(kept, model.device):
        note(f"This CPU emulates {machine.name_of(kept)}: computing in {machine.name_of(model.dtype)}.")
    return Loaded(name, machine.name_of(model.dtype), model, tokenizer, find_sites(model, target_modules))


def base_name(model: str) -> str:
    """What an adapter calls its base model: the absolute path of a local one, so that it is found from anywhere."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() else model


def base_of(adapter: Adapter, path: str) -> str:
    """The base model that an adapter names.

    Raises:
        SponError: it names none.
    """
    if not adapter.base_model:
        raise SponError.of(f"{path}: base_model_name_or_path", adapter.base_model, "the base model's name or path")
    return adapter.base_model
