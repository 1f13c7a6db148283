# SPDX-License-Identifier: Apache-2.0
"""The model that a command works on, and what its adapter calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spon_cli.output import note
from spon_cli.progress import progress_bars
from spon_plugin import Site, find_sites, machine
from spon_plugin.adapter.hub import hub_id_of
from spon_plugin.calibration.text import leading_windows, mixed_windows, opening_text
from spon_plugin.decoder.left_dense import left_dense
from spon_plugin.files import user_path
from spon_plugin.studies.last_word import Passage, encode
from spon_transformers.text_sources import TextSource
from spon_transformers.windows import check_ids, check_length


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

    def mixed_windows(self, sources: Sequence[TextSource], length: int, count: int, seed: int) -> Tensor:
        """An even mix of texts as token ids ``[<= count, length]``; see `spon_plugin.calibration.text.mixed_windows`.

        Raises:
            SponError: a text is too short, or the model cannot read such windows.
        """
        check_length(self.model, length)
        return self.checked(mixed_windows(self.tokenizer, [source.text for source in sources], length, count, seed))

    def leading_windows(self, source: TextSource, length: int, max_tokens: int) -> Tensor:
        """The start of a text as token ids ``[count, length]``; see `spon_plugin.calibration.text.leading_windows`.

        Raises:
            SponError: the text is too short, or the model cannot read such windows.
        """
        check_length(self.model, length)
        return self.checked(leading_windows(self.tokenizer, source.text, length, max_tokens))

    def checked(self, ids: Tensor) -> Tensor:
        """Token ids of any shape, if the model knows them.

        Raises:
            SponError: it does not.
        """
        check_ids(self.model, ids)
        return ids

    def encoded(self, texts: Sequence[str]) -> list[Passage]:
        """Passages whose last words are to be guessed; see `last_word.encode`.

        Raises:
            SponError: the model cannot read one of them.
        """
        passages = encode(self.tokenizer, texts)
        for passage in passages:
            check_length(self.model, len(passage.ids))
            self.checked(passage.ids)
        return passages

    @property
    def opening(self) -> str | None:
        """What its windows of text begin with, ``<s>`` for Llama; None where that is the text itself."""
        return opening_text(self.tokenizer)


def load(
    name: str,
    dtype: str,
    target_modules: Sequence[str] | None = None,
    precision: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a model and its tokenizer and find its input sites.

    Args:
        name: as the user gave it.
        dtype: of the weights; ``auto`` follows the machine, see `spon_transformers.loading.load_model`.
        target_modules: names of the linears to sparsify; all by default.
        precision: quantizes the linears, see `load_precision`.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        SponError: the model cannot be loaded, or a target is not one of its linears.
    """
    from spon_transformers.loading import load_model, load_tokenizer
    from spon_transformers.precision import load_precision

    quiet()
    with progress_bars() as stage:
        stage("Loading the model")
        tokenizer = load_tokenizer(name, trust_remote_code)
        if precision is None:
            model = load_model(name, dtype, trust_remote_code=trust_remote_code)
        else:
            model = load_precision(name, precision, dtype, trust_remote_code)
    kept = getattr(model.config, "dtype", None)
    if dtype == "auto" and isinstance(kept, torch.dtype) and not machine.is_native(kept, model.device):
        note(f"This CPU emulates {machine.name_of(kept)}: computing in {machine.name_of(model.dtype)}.")
    if target_modules is None:
        for reason, paths in left_dense(model).items():
            note(f"Left dense: {len(paths)} linears such as {paths[0]}, {reason}.")
    return Loaded(name, machine.name_of(model.dtype), model, tokenizer, find_sites(model, target_modules))


def quiet() -> None:
    """Keep transformers from drawing bars and telling what it does: ours say what is going on."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def base_name(model: str) -> str:
    """What an adapter calls its base model: its hub id where it has one, else its absolute path.

    The digest beside the name (`SponFields.base_digest`) tells whether another copy is that model.
    """
    path = user_path(model, "model")
    return hub_id_of(path) or str(path.absolute()) if path.exists() else model
