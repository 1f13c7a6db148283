# SPDX-License-Identifier: Apache-2.0
"""`SponTrainer`: trains alphas against the dense model, which is the same model with its adapters off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import Trainer

from spon_peft.layer import SponLayer
from spon_peft.teacher import TEACHER_BYTES, TeacherStates
from spon_plugin.decoder.block_states import BlockStates
from spon_plugin.decoder.head import OutputHead, backbone_hidden, find_head
from spon_plugin.decoder.positions import read_as
from spon_plugin.errors import SponError
from spon_plugin.training.objective import Objective

_NOT_FOR_THE_MODEL = ("labels", "shift_labels", "num_items_in_batch")


class SponTrainer(Trainer):
    """Minimizes ``KL(dense || sparse)`` over output tokens, a `transformers.Trainer` in everything else.

    ``labels`` select tokens, as in the cross-entropy of causal language models: position i counts where the label of
    i + 1 is not -100. The loss is the mean over the tokens of all accumulated batches (and of all devices, with
    `average_tokens_across_devices`). Adapters for ``tokens="decode"`` see the tokens labelled -100 as the context,
    which runs dense.

    Args:
        *args: as for `transformers.Trainer`; the model is a `PeftModel` or has injected SPON layers.
        temperature: divides the logits of both models; greater than 0.
        objective: options of the loss, `temperature` among them; the divergence alone by default.
        teacher_bytes: how much of the dense model's states may be kept, on the CPU, where a run has more than one
            epoch: what is kept is not computed again. 0 for nothing.
        **kwargs: likewise.

    Raises:
        SponError: the model has no SPON layers or is an encoder-decoder, an option of the loss is out of
            its range, `teacher_bytes` is negative, or several GPUs are used by one process.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        temperature: float = 1.0,
        objective: Objective | None = None,
        teacher_bytes: int = TEACHER_BYTES,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if objective is not None and temperature != 1.0:
            raise SponError.of("temperature", temperature, "nothing beside an objective, which has its own")
        self.objective: Objective = objective or Objective(temperature=temperature)
        if teacher_bytes < 0:
            raise SponError.of("teacher_bytes", teacher_bytes, "a number of bytes, at least 0")
        model: Any = self.model
        if not any(isinstance(module, SponLayer) for module in model.modules()):
            raise SponError.of("model", type(model).__name__, "a model with a SPON adapter", "See get_peft_model.")
        if getattr(model.config, "is_encoder_decoder", False):
            raise SponError.of("model", type(_base_model(model)).__name__, "a decoder")
        if self.args.n_gpu > 1:
            raise SponError.of("args.n_gpu", self.args.n_gpu, "1", "Start one process per GPU, with torchrun.")
        self.label_names = ["labels"]
        # These make the Trainer count the tokens of an accumulated batch as `_loss` does.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self._head: OutputHead | None = None
        self._head_is_known = False
        self._states: BlockStates | None = self.objective.block_states(_base_model(model))
        self._teacher = TeacherStates(teacher_bytes)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean KL divergence over the labelled tokens; see `transformers.Trainer.compute_loss`.

        Raises:
            SponError: there are no labels.
        """
        if inputs.get("labels") is None:
            remedy = "DataCollatorForLanguageModeling(mlm=False) adds them."
            raise SponError.of("inputs", sorted(inputs), "a key 'labels', with -100 for tokens to skip", remedy)
        unwrapped = self.accelerator.unwrap_model(model)
        total, count = through_forward(model, unwrapped, lambda: self._loss(unwrapped, inputs))
        if num_items_in_batch is None:
            loss = total / count.clamp(min=1)
        else:
            loss = total / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # the gradients are averaged over processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def _loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The summed divergence and the number of tokens."""
        base, labels = _base_model(model), inputs["labels"]
        inputs = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
        counted = labels[:, 1:] != -100

        def output() -> Tensor:
            if self._head is not None:
                return backbone_hidden(base, inputs)
            logits: Tensor = base(**inputs, use_cache=False).logits
            return logits

        def run() -> Tensor:
            out = output() if self._states is None else self._states.beside(output)
            return out[:, :-1][counted]

        with self.accelerator.autocast():
            again = model.training and self._comes_again()
            with torch.no_grad(), dense_model(model):
                if not self._head_is_known:
                    self._head, self._head_is_known = find_head(base, inputs), True
                teacher = self._teacher.of(inputs, counted, run) if again else run()
            if torch.is_autocast_enabled(teacher.device.type):
                torch.clear_autocast_cache()  # weights that the teacher's pass cast have no gradient
            with read_as(labels == -100):
                student = run()
        return self.objective.loss(student, teacher, self._head, self._states), counted.sum()

    def _comes_again(self) -> bool:
        """Whether the rows of the training data come again, to a dense model that is still the same."""
        if self._teacher.limit == 0 or self.state.num_train_epochs <= 1:
            return False
        model: Any = self.model
        layers = [module for module in model.modules() if isinstance(module, SponLayer)]
        alphas = {id(alpha) for layer in layers for alpha in layer.spon_alpha.values()}
        return all(id(parameter) in alphas for parameter in model.parameters() if parameter.requires_grad)


def _base_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def dense_model(model: nn.Module) -> Iterator[None]:
    """In this block `model` is the dense one: adapters off, dropout off.

    Unlike `PeftModel.disable_adapter` it leaves `requires_grad` alone, which DDP and recorded graphs depend on.
    """
    modes = [(module, module.training) for module in model.modules()]
    switches = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    states = [switch._disable_adapters for switch in switches]
    try:
        for module, _ in modes:
            module.training = False
        for switch in switches:
            switch._disable_adapters = True
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for switch, state in zip(switches, states, strict=True):
            switch._disable_adapters = state


def through_forward(wrapper: nn.Module, module: nn.Module, function: Callable[[], Any]) -> Any:
    """Call `function` as if it were the forward pass of `module`, through the `wrapper` around it.

    DistributedDataParallel synchronizes gradients, and FSDP and ZeRO gather weights, for what their own `forward`
    calls; a loss that runs the modules inside would miss that. (TRL and Lightning do the same.)
    """
    if wrapper is module:
        return function()
    had, forward = "forward" in vars(module), module.forward

    def restore() -> None:
        if had:
            module.forward = forward  # type: ignore[method-assign]
        else:
            vars(module).pop("forward", None)

    def once(*_args: Any, **_kwargs: Any) -> Any:
        restore()
        return function()

    module.forward = once  # type: ignore[method-assign]
    try:
        return wrapper()
    finally:
        restore()
