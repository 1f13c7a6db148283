# SPDX-License-Identifier: Apache-2.0
"""Make PEFT know the method: a member of its `PeftType`, and entries in its tables."""

from __future__ import annotations

import enum
import functools
from typing import Any

from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from spon_plugin.adapter.config import PEFT_TYPE
from spon_plugin.errors import SponError
from spon_plugin.weights.linears import is_sparse


def add_member(cls: type[enum.Enum], name: str, value: str) -> enum.Enum:
    """Add ``name = value`` to a finished ``class cls(str, Enum)``, or return the member that is there.

    PEFT finds methods by members of an enumeration and offers no way to add one. Setting the attribute on the type as
    well as filling the maps is what works on Python 3.10 to 3.15 alike; the maps alone break from 3.12 on.

    Raises:
        RuntimeError: this Python's enumerations cannot be extended in this way.
    """
    if name in cls.__members__:
        return cls.__members__[name]
    member: Any = str.__new__(cls, value)  # type: ignore[type-var]
    member._name_, member._value_ = name, value
    member.__objclass__ = cls
    member._sort_order_ = len(cls._member_names_)
    type.__setattr__(cls, name, member)
    cls._member_names_.append(name)
    cls._member_map_[name] = member
    cls._value2member_map_[value] = member
    # Here rather than later, in a user's save_pretrained.
    found = (cls(value), cls[name], getattr(cls, name), list(cls)[-1])
    if any(each is not member for each in found) or member.value != value or member.name != name:
        raise RuntimeError(f"{cls.__name__} cannot be extended by {name} on this Python; please report it.")
    return member


def register() -> None:
    """Register the method with PEFT; calling it again is harmless.

    Raises:
        RuntimeError: another package has registered the PEFT type SPON.
    """
    from spon_peft.config import SponConfig
    from spon_peft.model import SponModel

    member: Any = add_member(PeftType, PEFT_TYPE, PEFT_TYPE)
    registered = PEFT_TYPE_TO_TUNER_MAPPING.get(member)
    if registered not in (None, SponModel):
        raise RuntimeError(f"{registered} is registered as the PEFT type {PEFT_TYPE} already.")
    if registered is None:
        register_peft_method(name=PEFT_TYPE.lower(), config_cls=SponConfig, model_cls=SponModel)
    _check_adapters_when_read()
    _keep_updates_before_masks()


def _check_adapters_when_read() -> None:
    """Have every adapter directory of ours checked when its config is read, before a model is touched.

    `PeftConfig.from_pretrained` is where `PeftModel`, `AutoPeftModel` and transformers' `load_adapter` all begin. It
    builds the config of any method without telling that method's class where from, hence the wrapper.
    """
    from spon_peft.adapters import check_directory
    from spon_peft.config import SponConfig

    mixin: Any = PeftConfigMixin
    original: Any = mixin.__dict__["from_pretrained"].__func__
    if hasattr(original, "_spon_checks"):
        return

    @functools.wraps(original)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, SponConfig):
            check_directory(config, pretrained_model_name_or_path, subfolder)
        return config

    vars(from_pretrained)["_spon_checks"] = True
    checked: Any = from_pretrained
    mixin.from_pretrained = classmethod(checked)


def _keep_updates_before_masks() -> None:
    """Have every method refuse to merge into a sparse layer of a merged model.

    Beside such a layer an update sees the whole input; merged into the layer's weight it would see the masked one.
    """
    tuner: Any = BaseTuner
    original = tuner._check_merge_allowed
    if hasattr(original, "_spon_checks"):
        return

    @functools.wraps(original)
    def check_merge_allowed(self: Any) -> None:
        original(self)
        for path, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer) and is_sparse(module.get_base_layer()):
                expected = "a dense linear: merged into this one, the update would lie behind its mask"
                remedy = "Leave it unmerged, or merge it into the dense base and apply the SPON adapter after it."
                raise SponError.of(f"merge: {path}", type(module.get_base_layer()).__name__, expected, remedy)

    vars(check_merge_allowed)["_spon_checks"] = True
    tuner._check_merge_allowed = check_merge_allowed
