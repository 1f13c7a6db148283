# SPDX-License-Identifier: Apache-2.0
"""What an adapter file holds beside masks: tensors of whole modules, which PEFT saves with any adapter.

These are the modules in `modules_to_save`, and the embedding and the output head where they were resized or are
targeted themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from spon_plugin.adapter.mask import KINDS
from spon_plugin.errors import SponError

KEY_PREFIX = "base_model.model."
"""What every key of an adapter file begins with."""


def saved_tensors(file: str, tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of modules that PEFT saved whole.

    Those are the modules that `names` name, with what is inside them, and embeddings and output heads: a matrix
    ``[vocabulary, hidden]`` outside of the numbered blocks, with its bias.

    Args:
        file: the adapter file's name, for the error.
        tensors: all that it holds.
        names: `modules_to_save` of the config, which PEFT matches by the end of a path.

    Returns:
        By their keys without `KEY_PREFIX`.

    Raises:
        SponError: a tensor is neither a mask's nor such a module's.
    """
    found = {}
    for key, tensor in tensors.items():
        module, _, kind = key.removeprefix(KEY_PREFIX).rpartition(".")
        ours = key.startswith(KEY_PREFIX) and module != ""
        if ours and kind in KINDS:
            continue
        weight = tensors.get(f"{KEY_PREFIX}{module}.weight")
        end = kind in ("weight", "bias") and weight is not None and weight.dim() == 2 and not _in_a_block(module)
        if not (ours and (end or _is_named(module, names))):
            expected = f"keys {KEY_PREFIX}<module>.{'|'.join(KINDS)}, or those of modules_to_save"
            raise SponError.of(f"{file}: {key}", "an unknown tensor", expected)
        found[f"{module}.{kind}"] = tensor
    return found


def _in_a_block(module: str) -> bool:
    return any(part.isdigit() for part in module.split("."))


def _is_named(module: str, names: Sequence[str]) -> bool:
    """Whether the module, or one that it is inside of, is one of `names`."""
    parts = module.split(".")
    return any(".".join(parts[:count]).endswith(name) for count in range(1, len(parts) + 1) for name in names)
