# SPDX-License-Identifier: Apache-2.0
"""What an adapter's config says: its fields, the names in them, and the checks that they make sense."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from spon_plugin.errors import SponError
from spon_plugin.masking import TOKEN_MODES, check_sparsity

PEFT_TYPE = "SPON"
FORMAT_VERSION = 2
"""Of new adapters. An adapter of version 1 is read as what it is, and written again as version 1."""
READ_VERSIONS = (1, 2)
CHANNEL_MODULES, CENTER_MODULES = "channel_modules", "center_modules"
ALLOCATIONS = ("uniform", "greedy", "sensitivity")


@dataclass
class SponFields:
    """What an adapter's config says beyond PEFT's own fields. `SponConfig` of `spon_peft` has the same ones.

    Attributes:
        sparsity: the target, the share of inputs zeroed, in [0, 1).
        allocation: how the target was spread: ``uniform`` over the sites, TEAL's block-wise ``greedy``, or by
            ``sensitivity`` over channels (`spon_plugin.calibration.sensitivity`).
        tokens: which tokens are masked: ``all``, or ``decode`` (the context runs dense).
        dense_prefix: the first positions of a sequence that stay dense: 0 by default, so that the mask is a function of
            the input alone; 1 in format version 1.
        alpha_modules: which of the sparsified linears carry an alpha: ``"all"``, or a list of names matched as
            PEFT matches `target_modules` (whole path or its end); an empty list for none (plain TEAL).
        calibration: how thresholds and alphas were made: enough to make them again.
        alpha_scale: module path -> the unit of alpha's learning rate, a layer's magnitude as the method sees it; for
            the linears that carry an alpha. Empty where it is not known.
        base_digest: of the base model's weights, see `adapter.base.base_digest`; empty where it is not known.
        format_version: of the directory; see `FORMAT_VERSION`.

    A field that came with a later version says so by ``metadata={"since": version}``: adapters of earlier ones are
    written without it, and those that have nothing in it, too.
    """

    sparsity: float = 0.5
    allocation: str = "uniform"
    tokens: str = "all"
    dense_prefix: int = None  # type: ignore[assignment]  # the version's own, see above
    alpha_modules: str | list[str] = "all"
    calibration: dict[str, Any] = field(default_factory=dict)
    alpha_scale: dict[str, float] = field(default_factory=dict, metadata={"since": 2})
    base_digest: str = field(default="", metadata={"since": 2})
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.dense_prefix is None:
            self.dense_prefix = 1 if self.format_version == 1 else 0
        following: Any = super()  # PEFT's, in a config of its own
        if hasattr(following, "__post_init__"):
            following.__post_init__()

    def stored(self) -> dict[str, Any]:
        """What a config file says of these fields: name -> value."""
        values = {f: getattr(self, f.name) for f in fields(SponFields)}
        return {
            f.name: value
            for f, value in values.items()
            if "since" not in f.metadata or (value and f.metadata["since"] <= self.format_version)
        }

    def check(self) -> None:
        """Raise `SponError` for the first field that is wrong."""
        check_fields({f.name: getattr(self, f.name) for f in fields(SponFields)})


def check_fields(values: Mapping[str, Any]) -> None:
    """Check the values of `SponFields`' fields, wherever they come from.

    Raises:
        SponError: names the field, its value and what was expected.
    """
    version = values["format_version"]
    if type(version) is not int or version not in READ_VERSIONS:
        remedy = "Upgrade spon-plugin." if isinstance(version, int) and version > FORMAT_VERSION else ""
        raise SponError.of("format_version", version, " or ".join(map(str, READ_VERSIONS)), remedy)
    check_sparsity(values["sparsity"])
    for name, allowed in (("allocation", ALLOCATIONS), ("tokens", TOKEN_MODES)):
        if values[name] not in allowed:
            raise SponError.of(name, values[name], "one of " + ", ".join(allowed))
    prefix = values["dense_prefix"]
    if type(prefix) is not int or prefix < 0:
        raise SponError.of("dense_prefix", prefix, "a whole number >= 0")
    check_modules("alpha_modules", values["alpha_modules"])
    if not isinstance(values["calibration"], dict):
        raise SponError.of("calibration", values["calibration"], "a JSON object")
    if not isinstance(values["base_digest"], str):
        raise SponError.of("base_digest", values["base_digest"], "a string")
    scales = values["alpha_scale"]
    if not isinstance(scales, dict):
        raise SponError.of("alpha_scale", scales, "a JSON object: module paths and numbers")
    for path, scale in scales.items():
        if type(scale) not in (int, float) or not 0 <= scale < math.inf:
            raise SponError.of(f"alpha_scale: {path}", scale, "a finite number >= 0")


def check_modules(field: str, modules: Any) -> None:
    """Check a field that says which of the sparsified linears have something.

    Raises:
        SponError: it is neither ``"all"`` nor a list of names.
    """
    if not (modules == "all" or (isinstance(modules, list) and all(isinstance(m, str) and m for m in modules))):
        raise SponError.of(field, modules, '"all" or a list of module names')


def names_module(modules: str | Iterable[str], module: str) -> bool:
    """Whether a field such as `SponFields.alpha_modules` names the linear at path `module`."""
    if isinstance(modules, str):
        return modules == "all"
    return any(module == name or module.endswith("." + name) for name in modules)


def short_names(modules: Iterable[str], among: Iterable[str]) -> str | list[str]:
    """A field that names the linears at the paths `modules` and no others `among` the sparsified ones.

    ``"all"``, the last names (``down_proj``) where they fit, or else the paths.
    """
    wanted, every = set(modules), set(among)
    if wanted and wanted == every:
        return "all"
    leaves = sorted({module.rpartition(".")[2] for module in wanted})
    return leaves if wanted == {module for module in every if names_module(leaves, module)} else sorted(wanted)


def carries_alpha(module: str, alpha_modules: str | Iterable[str]) -> bool:
    """Whether the linear at path `module` carries an alpha, by `SponFields.alpha_modules`."""
    return names_module(alpha_modules, module)
