# SPDX-License-Identifier: Apache-2.0
"""What `--model_args` says about the adapter, checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.adapter.base import base_of
from spon_plugin.adapter.directory import read_adapter
from spon_plugin.adapter.hub import adapter_directory
from spon_plugin.errors import SponError
from spon_plugin.masking import TOKEN_MODES

_SWITCH = {"on": True, "off": False, True: True, False: False}  # YAML files say on and off as booleans


@dataclass(frozen=True)
class SponArguments:
    """The adapter, and how it is to be evaluated.

    Attributes:
        name: as the user gave it: a directory or a hub id.
        directory: where its files are.
        adapter: as read from there.
        tokens: ``all`` or ``decode``.
        dense_prefix: how many first positions of a sequence stay dense.
        alpha: whether the alphas count; False evaluates the masks alone (TEAL).
    """

    name: str
    directory: Path
    adapter: Adapter
    tokens: str
    dense_prefix: int
    alpha: bool

    @classmethod
    def of(
        cls,
        spon: Any,
        tokens: Any = None,
        alpha: Any = "on",
        dense_prefix: Any = None,
        peft: Any = None,
        delta: Any = None,
    ) -> SponArguments:
        """Check the arguments and read the adapter.

        Args:
            spon: an adapter directory, or the id of one on the Hugging Face hub.
            tokens: ``all`` or ``decode``; the adapter's own mode by default.
            alpha: ``on`` or ``off``.
            dense_prefix: a whole number; the adapter's own by default.
            peft: lm-eval's argument of that name, which must not be there.
            delta: likewise.

        Raises:
            SponError: an argument is missing, unknown, or does not go together with another; the adapter is not sound.
        """
        if not isinstance(spon, str) or not spon:
            remedy = "For the dense model use --model hf."
            raise SponError.of("model_args: spon", spon, "an adapter directory, as spon=DIR", remedy)
        for name, value in (("peft", peft), ("delta", delta)):
            if value:
                remedy = "Merge the other adapter into the base model first."
                raise SponError.of(f"model_args: {name}", value, "nothing beside spon=", remedy)
        if tokens is not None and tokens not in TOKEN_MODES:
            raise SponError.of("model_args: tokens", tokens, "one of " + ", ".join(TOKEN_MODES))
        if not isinstance(alpha, str | bool) or alpha not in _SWITCH:
            raise SponError.of("model_args: alpha", alpha, "on, or off for the masks alone (TEAL)")
        if dense_prefix is not None and (type(dense_prefix) is not int or dense_prefix < 0):
            raise SponError.of("model_args: dense_prefix", dense_prefix, "a whole number >= 0")
        directory = adapter_directory(spon, "model_args: spon")
        adapter = read_adapter(directory)
        fields = adapter.fields
        return cls(
            name=spon,
            directory=directory,
            adapter=adapter,
            tokens=fields.tokens if tokens is None else tokens,
            dense_prefix=fields.dense_prefix if dense_prefix is None else dense_prefix,
            alpha=_SWITCH[alpha] and adapter.has_alpha,
        )

    def base_model(self) -> str:
        """The base model that the adapter names.

        Raises:
            SponError: it names none, or one that has moved.
        """
        return base_of(self.adapter.peft, self.name, "Or give pretrained= in model_args.")

    def config(self) -> dict[str, Any]:
        """The adapter's config as in its file, less the list of sites that calibration went through."""
        config = self.adapter.config()
        calibration = {key: value for key, value in config["calibration"].items() if key != "sites"}
        return {**config, "calibration": calibration}
