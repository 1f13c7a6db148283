# SPDX-License-Identifier: Apache-2.0
"""Train alphas under any sparsification method, with a plain loop: the objective and schedule of `SponTrainer`.

`spon_peft.training` trains an adapter, with checkpoints and everything that a `transformers.Trainer` does. This loop
serves comparisons: any `sparsifiers.Fitted`, the dense model's hidden states made once for many runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from spon_plugin.adapter.config import carries_alpha
from spon_plugin.decoder.block_states import BlockStates
from spon_plugin.decoder.head import OutputHead, backbone_hidden, find_head
from spon_plugin.decoder.positions import whole_windows
from spon_plugin.errors import SponError
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Fitted
from spon_plugin.training.optimizer import FlatAdamW
from spon_plugin.training.recipe import Recipe

Losses = list[dict[str, float]]
"""One row per optimizer step: ``step``, ``loss`` (nats per token), ``grad_norm`` (before clipping)."""


class Teacher:
    """The dense model's last hidden states on a set of windows, which every run on these windows distils from.

    Attributes:
        windows: token ids ``[count, length]``.
        states: ``[count, length, hidden]`` in the model's dtype, on the CPU unless asked for; logits where the model's
            head cannot be run alone. After these, the states of `blocks`.
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
        keep_on_device: bool = False,
    ) -> None:
        self.windows, self.blocks = windows, blocks
        device = next(model.parameters()).device
        states: Tensor | None = None
        with torch.no_grad(), _frozen(model):
            self.head: OutputHead | None = find_head(model, {"input_ids": windows[:1].to(device)})
            for start in range(0, len(windows), batch_size):
                made = self.student(model, windows[start : start + batch_size].to(device))
                if states is None:
                    states = made.new_empty((len(windows), *made.shape[1:]), device=device if keep_on_device else "cpu")
                states[start : start + batch_size] = made
                progress(min(start + batch_size, len(windows)), len(windows))
        assert states is not None
        self.states = states

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


class Trained(NamedTuple):
    """What `distil` gives."""

    alphas: dict[str, Tensor]
    """Module path -> float32 ``[in_features]``, on the CPU."""
    losses: Losses
    method: Any
    """The method, at its final thresholds where they were brought to the target on the way."""


class Trainable(Protocol):
    """What `distil` trains beside alphas: a `SparseMethod` with parameters of its own."""

    def parameters(self, recipe: Recipe) -> list[tuple[Tensor, float]]:
        """Its parameters, leaves on the model's device, each with its highest rate."""


Match = Callable[[Any, Mapping[str, Tensor]], Any]
"""From a method and the alphas of the moment to the method at its target."""


def train_alphas(
    model: nn.Module,
    fitted: Fitted,
    teacher: Teacher,
    recipe: Recipe,
    alpha_modules: str | list[str] = "all",
    seed: int = 0,
    progress: Progress = no_progress,
) -> tuple[dict[str, Tensor], Losses]:
    """`distil`, with the method as it is from the first step to the last."""
    alphas, losses, _ = distil(model, fitted, fitted, teacher, recipe, alpha_modules, seed, progress)
    return alphas, losses


def distil(
    model: nn.Module,
    method: Any,
    fitted: Fitted,
    teacher: Teacher,
    recipe: Recipe,
    alpha_modules: str | list[str] = "all",
    seed: int = 0,
    progress: Progress = no_progress,
    match: Match | None = None,
) -> Trained:
    """Distil the dense model into alphas on top of a sparsification method.

    Minimizes the mean of `Recipe.objective` over the positions that predict a token of the window, with AdamW, each
    layer at `Recipe.rate` and `Recipe.decay` of its `Fitted.scales`, by `Recipe.factor`, the gradient clipped. Nothing
    waits for an accelerator before the last step.

    Args:
        model: the dense model.
        method: what runs the model sparsely: `fitted` itself, or something around it, which may be `Trainable`.
        fitted: the method, which says what a layer's rate is.
        teacher: the dense model's states on the training windows.
        recipe: the schedule; its windows are those of `teacher`.
        alpha_modules: which of the method's linears carry an alpha, as in an adapter's config.
        seed: of the order of the windows.
        progress: called after each step.
        match: brings `method` to its target after `Recipe.rematch_steps`.

    Raises:
        SponError: no linear of the method carries an alpha, there are fewer windows than a step takes, the recipe
            wants thresholds to be matched and nothing does, or the teacher has not the states that the objective
            compares.
    """
    carriers = [path for path in fitted.modules if carries_alpha(path, alpha_modules)]
    if not carriers:
        names = ", ".join(sorted({path.rpartition(".")[2] for path in fitted.modules}))
        raise SponError.of("alpha_modules", alpha_modules, f'"all" or names of linears that the method covers: {names}')
    if len(teacher.windows) < recipe.batch_size:
        raise SponError.of("training windows", len(teacher.windows), f"at least {recipe.batch_size}, those of one step")
    if recipe.rematch and match is None:
        raise SponError.of("rematch", recipe.rematch, "0, where nothing holds the thresholds at a target")
    objective = recipe.objective
    compared, have = objective.hidden_blocks * bool(objective.hidden_weight), len(getattr(teacher.blocks, "blocks", ()))
    if compared and have != compared:
        raise SponError.of("teacher", f"states of {have} blocks", f"{compared}", "Give it Objective.block_states.")
    device = next(model.parameters()).device
    sizes = {path: fitted.site_of[path].in_features for path in carriers}
    alphas = {path: torch.zeros(sizes[path], device=device, requires_grad=True) for path in carriers}
    others = method.parameters(recipe) if hasattr(method, "parameters") else []
    optimizer = FlatAdamW(
        [*alphas.values(), *(parameter for parameter, _ in others)],
        [*(recipe.rate(fitted.scales[path]) for path in carriers), *(rate for _, rate in others)],
        [*(recipe.decay(fitted.scales[path]) for path in carriers), *(0.0 for _ in others)],
        recipe.max_grad_norm,
    )
    order = torch.stack(list(_batches(len(teacher.windows), recipe, seed)))
    windows, places = teacher.windows.to(device), order.to(teacher.states.device)
    order = order.to(device)
    made: list[tuple[Tensor, Tensor]] = []
    with _frozen(model):
        for begin, end in pairwise([0, *recipe.rematch_steps, recipe.steps]):
            if begin and match is not None:
                method = match(method, {path: alpha.detach() for path, alpha in alphas.items()})
            with method.attach(model, alphas):
                for step in range(begin, end):
                    with whole_windows():
                        student = teacher.student(model, windows[order[step]])[:, :-1].flatten(0, 1)
                    dense = teacher.states[places[step]][:, :-1].flatten(0, 1).to(device)
                    loss = objective.loss(student, dense, teacher.head, teacher.blocks) / len(student)
                    loss.backward()
                    made.append((loss.detach(), optimizer.step(recipe.factor(step))))
                    progress(step + 1, recipe.steps)
    losses = [
        {"step": step, "loss": loss.item(), "grad_norm": norm.item()} for step, (loss, norm) in enumerate(made, start=1)
    ]
    return Trained({path: alpha.detach().cpu().clone() for path, alpha in alphas.items()}, losses, method)


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
