# SPDX-License-Identifier: Apache-2.0
"""Which linears PEFT makes sparse where `target_modules` is None: those that calibration would."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from spon_plugin.decoder.sites import default_modules, names_of
from spon_plugin.errors import SponError


def default_targets(model: nn.Module) -> set[str]:
    """Names for `SponConfig.target_modules`, by the structure of the model; it is not run, and may lie anywhere.

    Args:
        model: the base model, with the layers of other adapters around its linears or without.

    Raises:
        SponError: the model has no blocks with linears in them.
    """
    wrapped = [path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    held = {f"{path}.base_layer": path for path in wrapped}
    paths = [held.get(path, path) for path in default_modules(model)]
    inside = tuple(f"{path}." for path in wrapped)
    names = names_of((path for path in paths if not path.startswith(inside)), model)
    if not names:
        remedy = 'Please specify `target_modules` in `peft_config`: names of linears, or "all-linear".'
        raise SponError.of("target_modules", None, f"names, as {type(model).__name__} has no blocks of linears", remedy)
    return set(names)
