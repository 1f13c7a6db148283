# SPDX-License-Identifier: Apache-2.0
"""Train alphas under any sparsification method, with a plain loop: the objective and schedule of `SponTrainer`.

`spon_peft.training` trains an adapter, with checkpoints and everything that a `transformers.Trainer` does. This loop
serves comparisons: any `sparsifiers.Fitted`, the dense model's hidden states made once for many runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.adapter.config import carries_alpha
from spon_plugin.decoder.block_states import BlockStates
from spon_plugin.decoder.head import OutputHead, backbone_hidden, find_head
from spon_plugin.decoder.positions import whole_windows
from spon_plugin.errors import SponError
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Fitted
from spon_plugin.training.recipe import Recipe

Losses = list[dict[str, float]]
"""One row per optimizer step: ``step``, ``loss`` (nats per token), ``grad_norm`` (before clipping)."""


class Teacher:
    """The dense model's last hidden states on a set of windows, which every run on these windows distils from.

    Attributes:
        windows: token ids ``[count, length]``.
        states: ``[count, length, hidden]`` in the model's dtype, on the CPU; logits where the model's head cannot be
            run alone. After these, the states of `blocks`.
        head: from states to logits; None for logits.
        blocks: whose states are beside the last ones, as `Objective.block_states` wants them; None for none.
    """

    def __init__(
        self,
        model: Any,
        windows: Tensor,
        batch_size: int = 4,
        progress: Progress = no_progress,
        blocks: BlockStates | None = None,
    ) -> None:
        self.windows, self.blocks = windows, blocks
        device = next(model.parameters()).device
        states = []
        with torch.no_grad(), _frozen(model):
            self.head: OutputHead | None = find_head(model, {"input_ids": windows[:1].to(device)})
            for start in range(0, len(windows), batch_size):
                states.append(self.student(model, windows[start : start + batch_size].to(device)).cpu())
                progress(min(start + batch_size, len(windows)), len(windows))
        self.states = torch.cat(states)

    def student(self, model: Any, ids: Tensor) -> Tensor:
        """The same of `model` as it is now, for ``ids [batch, length]``."""

        def run() -> Tensor:
            if self.head is not None:
                return backbone_hidden(model, {"input_ids": ids})
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
            return logits

        return run() if self.blocks is None else self.blocks.beside(run)

    def logits(self, row: int, tokens: slice) -> Tensor:
        """The dense model's, for some tokens of a window: ``[tokens, vocabulary]``, where its head is."""
        beside = 0 if self.blocks is None else self.blocks.width
        states = self.states[row, tokens, : self.states.shape[-1] - beside]
        return states if self.head is None else self.head(states.to(self.head.device))

    def first(self, count: int) -> Teacher:
        """The same for the first `count` windows, sharing the states."""
        part = copy.copy(self)
        part.windows, part.states = self.windows[:count], self.states[:count]
        return part


def train_alphas(
    model: nn.Module,
    fitted: Fitted,
    teacher: Teacher,
    recipe: Recipe,
    alpha_modules: str | list[str] = "all",
    seed: int = 0,
    progress: Progress = no_progress,
) -> tuple[dict[str, Tensor], Losses]:
    """Distil the dense model into alphas on top of a sparsification method.

    Minimizes the mean of `Recipe.objective` over the positions that predict a token of the window, with AdamW, each
    layer at `Recipe.rate` and `Recipe.decay` of its `Fitted.scales`, by `Recipe.factor`, the gradient clipped.

    Args:
        model: the dense model.
        fitted: the method.
        teacher: the dense model's states on the training windows.
        recipe: the schedule; its windows are those of `teacher`.
        alpha_modules: which of the method's linears carry an alpha, as in an adapter's config.
        seed: of the order of the windows.
        progress: called after each step.

    Returns:
        Module path -> float32 ``[in_features]``, and the loss of every step.

    Raises:
        SponError: no linear of the method carries an alpha, there are fewer windows than a step takes, or the teacher
            has not the states that the objective compares.
    """
    carriers = [path for path in fitted.modules if carries_alpha(path, alpha_modules)]
    if not carriers:
        names = ", ".join(sorted({path.rpartition(".")[2] for path in fitted.modules}))
        raise SponError.of("alpha_modules", alpha_modules, f'"all" or names of linears that the method covers: {names}')
    if len(teacher.windows) < recipe.batch_size:
        raise SponError.of("training windows", len(teacher.windows), f"at least {recipe.batch_size}, those of one step")
    objective = recipe.objective
    compared, have = objective.hidden_blocks * bool(objective.hidden_weight), len(getattr(teacher.blocks, "blocks", ()))
    if compared and have != compared:
        raise SponError.of("teacher", f"states of {have} blocks", f"{compared}", "Give it Objective.block_states.")
    device = next(model.parameters()).device
    sizes = {path: fitted.site_of[path].in_features for path in carriers}
    alphas = {path: torch.zeros(sizes[path], device=device, requires_grad=True) for path in carriers}
    rates = [recipe.rate(fitted.scales[path]) for path in carriers]
    groups = [
        {"params": [alphas[path]], "lr": rate, "weight_decay": recipe.decay(fitted.scales[path])}
        for path, rate in zip(carriers, rates, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups)
    losses: Losses = []
    with _frozen(model), fitted.attach(model, alphas):
        for step, rows in enumerate(_batches(len(teacher.windows), recipe, seed)):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * recipe.factor(step)
            ids = teacher.windows[rows].to(device)
            with whole_windows():
                student = teacher.student(model, ids)[:, :-1].flatten(0, 1)
            dense = teacher.states[rows][:, :-1].flatten(0, 1).to(device)
            loss = objective.loss(student, dense, teacher.head, teacher.blocks) / len(student)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(list(alphas.values()), recipe.max_grad_norm)
            optimizer.step()
            losses.append({"step": step + 1, "loss": loss.item(), "grad_norm": float(norm)})
            progress(step + 1, recipe.steps)
    return {path: alpha.detach().cpu() for path, alpha in alphas.items()}, losses


def loss_ends(losses: Losses) -> dict[str, float]:
    """The mean loss of the ``first`` and the ``last`` tenth of the steps."""
    tenth = max(1, len(losses) // 10)
    first, last = (sum(row["loss"] for row in part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    return {"first": first, "last": last}


def _batches(count: int, recipe: Recipe, seed: int) -> Iterator[Tensor]:
    """The rows of each step: every epoch in a new order, the rest that fills no batch left out."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(recipe.steps):
        if len(order) < recipe.batch_size:
            order = torch.randperm(count, generator=generator)
        rows, order = order[: recipe.batch_size], order[recipe.batch_size :]
        yield rows


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """In this block no parameter asks for a gradient and the model is in evaluation mode."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    try:
        model.eval()
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
        model.train(training)
