# SPDX-License-Identifier: Apache-2.0
"""`SponConfig`, what PEFT's configs are for other methods."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

from spon_plugin.adapter.config import CENTER_MODULES, CHANNEL_MODULES, PEFT_TYPE, SponFields, check_modules
from spon_plugin.errors import SponError

_OWN = frozenset(f.name for f in fields(SponFields))


@dataclass
class SponConfig(SponFields, PeftConfig):
    """Configuration of a SPON adapter: which linears are sparsified, and how.

    The fields that say what the adapter computes (`sparsity`, `tokens`, `dense_prefix`, `alpha_modules`, ...) are those
    of `spon_plugin.SponFields`, with the same defaults. By default every token is masked; what leaves some dense by
    their position (`dense_prefix`, `tokens`) is for models that hand positions to their decoder blocks.

    Attributes:
        target_modules: the linears to sparsify: names (a whole path or its end), a regular expression, or
            ``"all-linear"``; all those in the model's blocks if None, as calibration has them.
        exclude_modules: names or a regular expression of modules to leave dense.
        layers_to_transform: indices of the blocks to transform; all if None.
        layers_pattern: name of the list of blocks, where `layers_to_transform` cannot find it.
        modules_to_save: modules besides the adapter that are trained and saved.
        fan_in_fan_out: accepted for likeness with PEFT's other methods; how a weight lies is read off its layer.
        channel_modules: which of the linears have a threshold for each of their inputs, not one for all: ``"all"``
            or a list of names, as `alpha_modules`.
        center_modules: which of them have a centre; likewise.
        init_weights: True starts as a no-op (threshold, centre and alpha 0); False draws them at random, for tests.

    Raises:
        SponError: a field is wrong; see `spon_plugin.adapter.directory.check_fields`.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, a regular expression or 'all-linear': the linears to sparsify."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules to leave dense."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to transform; all of them if None."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, for models with an uncommon one."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules besides the adapter that are trained and saved."}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Accepted and ignored: how a weight lies is read off its layer."}
    )
    channel_modules: str | list[str] = field(
        default_factory=list, metadata={"help": "Which of the linears have a threshold per channel: names or 'all'."}
    )
    center_modules: str | list[str] = field(
        default_factory=list, metadata={"help": "Which of the linears have a centre: names or 'all'."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start as a no-op. False draws what the adapter has at random, for tests."}
    )

    def to_dict(self) -> dict[str, Any]:
        """What PEFT writes: of our own fields what the adapter's format version has."""
        own = self.stored()
        return {name: value for name, value in super().to_dict().items() if name in own or name not in _OWN}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        for name in ("alpha_modules", CHANNEL_MODULES, CENTER_MODULES):
            if isinstance(getattr(self, name), set | tuple):
                setattr(self, name, sorted(getattr(self, name)))
        self.check()
        check_modules(CHANNEL_MODULES, self.channel_modules)
        check_modules(CENTER_MODULES, self.center_modules)
        # `is not None` throughout: 0 is the first block.
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise SponError.of(
                    name, getattr(self, name), "None, as `target_modules` is a regular expression", "Put it in there."
                )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise SponError.of("layers_pattern", self.layers_pattern, "None, as `layers_to_transform` is None")
