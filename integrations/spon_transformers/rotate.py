# SPDX-License-Identifier: Apache-2.0
"""Rotate the residual stream of a `PreTrainedModel` for the masks that it will run under: `spon_plugin.rotation`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spon_plugin.errors import SponError
from spon_plugin.progress import Progress, no_progress
from spon_plugin.rotation.cost import dropped_cost
from spon_plugin.rotation.sample import sample_inputs
from spon_plugin.rotation.search import STEPS, check_masked, find_rotation
from spon_plugin.rotation.stream import ResidualStream, check
from spon_transformers.loading import untie_head

_CHECKED = 16  # tokens that the model must say the same after as before


@dataclass(frozen=True)
class Rotated:
    """What a rotation brought.

    Attributes:
        sites: how many input sites read the rotated stream.
        before: `rotation.cost.dropped_cost` without it, on text that it was not chosen on.
        after: with it, on the same.
    """

    sites: int
    before: float
    after: float


@torch.no_grad()
def rotate_model(
    model: Any,
    windows: Tensor,
    held_out: Tensor,
    sparsity: float,
    steps: int = STEPS,
    seed: int = 0,
    stage: Callable[[str], Progress] = lambda _name: no_progress,
) -> Rotated:
    """Rotate a model's residual stream in place: it says what it said, and masks cost it less.

    The work is done in float32; weights are given back in the model's dtype. A tied head gets weights of its own. An
    adapter made before does not fit any more: calibrate on the rotated model.

    Args:
        model: a dense `PreTrainedModel` with floating-point weights.
        windows: token ids ``[count, length]`` that the rotation is chosen on; some ten thousand tokens.
        held_out: others, which say what it brings.
        sparsity: that masks will have.
        steps: of the search.
        seed: of what is drawn.
        stage: gives the progress callback of each piece of work by its name.

    Raises:
        SponError: the sparsity or the steps are out of range; the model is quantized, or its stream cannot be turned,
            which leaves it unusable.
    """
    check_masked(sparsity)
    if getattr(model, "is_quantized", False):
        raise SponError.of("model", "a quantized model", "floating-point weights", "Rotate the model that it was.")
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise SponError.of("model", type(model).__name__, "a model whose output head is a torch.nn.Linear")
    stored = model.dtype
    untie_head(model)
    model.float()

    def said() -> Tensor:
        logits: Tensor = model(input_ids=windows[:1, :_CHECKED].to(model.device), use_cache=False).logits
        return logits

    before = said()
    stream = ResidualStream.of(model, model.get_input_embeddings(), head)
    stream.fold_gains(model)
    check(model, stream, said, before)
    inputs, others = (
        [site.to(model.device) for site in sample_inputs(model, stream.sites, ids, seed, progress=stage(name))]
        for name, ids in (("What the output feels", windows), ("What it feels on other text", held_out))
    )
    rotation = find_rotation(inputs, sparsity, steps, seed, stage("Turning"))
    stream.rotate(model, rotation)
    costs = [dropped_cost(others, turned, sparsity) for turned in (torch.eye(len(rotation)).to(rotation), rotation)]
    model.to(stored)
    return Rotated(len(inputs), *costs)
