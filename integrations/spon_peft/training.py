# SPDX-License-Identifier: Apache-2.0
"""Train the alphas of an adapter by a recipe: from adapter to adapter, resumable and reproducible."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from spon_peft.adapters import collect_adapter, injected_layers
from spon_peft.checkpoints import check_plan, newest_whole
from spon_peft.trainer import SponTrainer, dense_model
from spon_plugin.adapter.adapter import Adapter
from spon_plugin.adapter.directory import write_adapter
from spon_plugin.calibration.sensitivity import match_sparsity
from spon_plugin.calibration.text import windows_digest
from spon_plugin.decoder.sites import Site, find_sites
from spon_plugin.training.recipe import Recipe, alpha_scales

Losses = list[dict[str, float]]
"""One row per optimizer step: ``step``, ``loss`` (nats per token), ``grad_norm`` (before clipping)."""


def train_adapter(
    model: Any,
    adapter: Adapter,
    windows: Tensor,
    recipe: Recipe,
    work: Path,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    save_every: int = 50,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[Adapter, Losses]:
    """Distil the dense model into the adapter's alphas.

    Training goes on from the newest whole checkpoint in `work`, if there is one, and ends where an uninterrupted run
    would.

    Args:
        model: the dense base model; wrapped by PEFT meanwhile, and dense again afterwards.
        adapter: thresholds, and alphas to start from.
        windows: token ids ``[count, length]``.
        recipe: the schedule. At its `rematch_steps` thresholds are brought to the adapter's target in the sparse model,
            on the first windows.
        work: a directory for checkpoints.
        seed: of the order of the windows.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        save_every: steps between checkpoints.
        progress: called with (done, total, note) after each step.

    Returns:
        The adapter with trained alphas, and the loss of every step.

    Raises:
        SponError: the checkpoints in `work` are of another recipe, seed, adapter, text or dtype of the base model.
    """
    plan = {**recipe.as_dict(), "seed": seed, "adapter": adapter.digest, "windows": windows_digest(windows)}
    check_plan(work, {**plan, "dtype": str(next(model.parameters()).dtype).removeprefix("torch.")})
    start = work / "start"
    shutil.rmtree(start, ignore_errors=True)
    write_adapter(adapter, start)
    sites = find_sites(model, sorted(adapter.masks)) if recipe.rematch else []
    wrapped = PeftModel.from_pretrained(model, start, is_trainable=True)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=0.0,
        max_grad_norm=recipe.max_grad_norm,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        data_seed=seed,
        save_steps=save_every,
        save_total_limit=1,
        logging_steps=1,
        dataloader_drop_last=len(windows) >= recipe.batch_size,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    losses: Losses = []
    optimizer = _optimizer(wrapped, recipe, alpha_scales(adapter))
    trainer = SponTrainer(
        model=wrapped,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in windows],
        data_collator=_stack,
        callbacks=[_Rematch(wrapped, adapter, sites, windows, recipe.rematch_steps), _Report(progress)],
        optimizers=(optimizer, LambdaLR(optimizer, recipe.factor)),
        objective=recipe.objective,
    )
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        # On saving a checkpoint PEFT wonders whether embeddings were trained, too; here only alphas are.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        trainer.train(resume_from_checkpoint=newest_whole(work))
    for row in trainer.state.log_history:
        if "loss" in row:
            losses.append({key: float(row[key]) for key in ("step", "loss", "grad_norm") if key in row})
    trained = collect_adapter(wrapped)
    wrapped.unload()
    return replace(adapter, masks=trained.masks), losses


def _optimizer(model: Any, recipe: Recipe, scales: Mapping[str, float]) -> torch.optim.Optimizer:
    """AdamW with a rate for every layer, in the units of `scales`."""
    groups = []
    for path, layer in injected_layers(model, model.active_adapter).items():
        rate, decay = recipe.rate(scales[path]), recipe.decay(scales[path])
        groups += [{"params": [alpha], "lr": rate, "weight_decay": decay} for alpha in layer.spon_alpha.values()]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@dataclass(eq=False)
class _Rematch(TrainerCallback):
    """Brings the thresholds to the adapter's target in the sparse model, with the alphas of that moment.

    Attributes:
        model: the `PeftModel`.
        adapter: that it was made of.
        sites: of the base model.
        windows: token ids to match on.
        steps: after which it is done.
    """

    model: Any
    adapter: Adapter
    sites: list[Site]
    windows: Tensor
    steps: Container[int]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer after each step, before a checkpoint is written."""
        if state.global_step not in self.steps:
            return
        name, fields = self.model.active_adapter, self.adapter.fields
        layers = {_inner(path): layer for path, layer in injected_layers(self.model, name).items()}
        masks = {path: layer.mask_of(name).map(Tensor.detach) for path, layer in layers.items()}
        sites = [replace(site, modules=tuple(map(_inner, site.modules))) for site in self.sites]
        with dense_model(self.model):
            base = self.model.get_base_model()
            found = match_sparsity(base, sites, masks, self.windows, fields.sparsity, fields.dense_prefix)
        for path, layer in layers.items():
            layer.spon_threshold[name].copy_(found[path].threshold)


def _inner(path: str) -> str:
    """The path of the dense linear in the layer that PEFT has put at `path`."""
    return f"{path}.base_layer"


class _Report(TrainerCallback):
    """Passes every logged step on."""

    def __init__(self, progress: Callable[[int, int, str], None] | None) -> None:
        self.progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Called by the trainer after each step."""
        if self.progress is not None and logs and "loss" in logs:
            self.progress(state.global_step, state.max_steps, f"KL {float(logs['loss']):.3f}")
