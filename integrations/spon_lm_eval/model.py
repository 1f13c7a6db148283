# SPDX-License-Identifier: Apache-2.0
"""`SponHFLM`: lm-eval's `HFLM` with a SPON adapter on its model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from spon_lm_eval import MODEL_NAME
from spon_lm_eval.arguments import SponArguments
from spon_lm_eval.continuations import Request, loglikelihoods
from spon_lm_eval.counts import InputCounts, Totals
from spon_lm_eval.layers import SparseModel, kernel_of, with_adapter
from spon_plugin import __version__
from spon_plugin.errors import SponError
from spon_plugin.machine import name_of
from spon_transformers.loading import follow_machine

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from torch import Tensor

log = logging.getLogger(__name__)


@register_model(MODEL_NAME)
class SponHFLM(HFLM):
    """``--model spon-hf --model_args pretrained=BASE,spon=ADAPTER`` and every other argument of `HFLM`.

    With ``tokens=all`` every token runs sparse but the adapter's dense prefix. With ``tokens=decode`` the context of a
    request runs dense and its continuation sparse, as when a served model reads a prompt and generates; see
    `spon_lm_eval.continuations` for what that costs. In `loglikelihood_rolling` the context of a window is what lm-eval
    puts before its first scored token: one token, and in a text's last window as many as fit. So there the modes are
    nearly one.

    Args:
        pretrained: the base model's name or path, or the model itself (which is changed in place); the one that the
            adapter names by default.
        spon: the adapter: a directory, or the id of one on the Hugging Face hub.
        tokens: ``all`` or ``decode``; the adapter's own mode by default.
        alpha: ``on``, or ``off`` for the masks alone (TEAL).
        dense_prefix: the first positions of a sequence that stay dense; the adapter's own by default.
        **kwargs: for `HFLM`.

    Raises:
        SponError: an argument is missing, unknown, or does not go together with `spon`; the adapter is not sound or
            was made for another base.
    """

    counts: InputCounts

    def __init__(
        self,
        pretrained: Any = None,
        spon: str | None = None,
        tokens: str | None = None,
        alpha: str | bool = "on",
        dense_prefix: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._arguments = SponArguments.of(
            spon, tokens, alpha, dense_prefix, peft=kwargs.get("peft"), delta=kwargs.get("delta")
        )
        if kwargs.get("tp_plan") is not None:
            remedy = "Use parallelize=True, or accelerate launch."
            raise SponError.of("model_args: tp_plan", kwargs["tp_plan"], "nothing beside spon=", remedy)
        self._sparse: SparseModel | None = None
        self._others = Totals()
        if pretrained is None:
            pretrained = self._arguments.base_model()
        elif isinstance(pretrained, str) and pretrained != self._arguments.adapter.base_model:
            log.info("The adapter was made for %s; it is put on %s.", self._arguments.adapter.base_model, pretrained)
        super().__init__(pretrained=pretrained, **kwargs)
        if self._sparse is None:  # a model that is loaded already
            self._sparsify()

    @property
    def inner(self) -> Any:
        """The transformers model, also where PEFT's is around it."""
        assert self._sparse is not None
        return self._sparse.inner

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        super()._create_model(*args, **kwargs)
        if kwargs.get("dtype", "auto") == "auto":
            self._follow_machine()
        self._sparsify()

    def _follow_machine(self) -> None:
        model: Any = self._model
        stored = model.dtype
        if follow_machine(model).dtype != stored:
            log.info("This CPU emulates %s: computing in %s.", name_of(stored), name_of(model.dtype))

    def _sparsify(self) -> None:
        if self.backend != "causal":
            raise SponError.of("pretrained", f"a {self.backend} model", "a decoder (AutoModelForCausalLM)")
        base: Any = self._model
        self._sparse = with_adapter(base, self._arguments)
        self._model: Any = self._sparse.model
        self.counts = InputCounts(self._sparse)

    def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Tensor:
        # HFLM calls it for each row of a pass in turn, and nowhere else is the length of the row to be had.
        if inplen is not None:
            self.counts.scored(inplen)
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self._arguments.tokens == "decode":
            return loglikelihoods(self, requests, disable_tqdm, override_bs)
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        eos = getattr(getattr(self.inner, "generation_config", None), "eos_token_id", None)
        ended = [self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
        with self.counts.generation([token for token in ended if token is not None]):
            return super()._model_generate(*args, **kwargs)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `HFLM.loglikelihood`."""
        return self._gathered(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """See `HFLM.loglikelihood_rolling`."""
        return self._gathered(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `HFLM.generate_until`."""
        return self._gathered(super().generate_until(requests, disable_tqdm=disable_tqdm))

    def _gathered(self, results: Any) -> Any:
        """Collect the counts of the other processes (data parallel), which lm-eval does not ask for a report."""
        if self.world_size > 1:
            parts: list[Any] = [None] * self.world_size
            torch.distributed.all_gather_object(parts, self.counts.totals())
            self._others = Totals()
            for rank, part in enumerate(parts):
                if rank != self.rank:
                    self._others = part + self._others
        return results

    def get_model_info(self) -> dict[str, Any]:
        """`HFLM`'s, and under ``spon`` the adapter, how it was evaluated, and the sparsity measured.

        The counts are of the tokens that were scored or generated, padding excluded. Requests that lm-eval answered
        from its own cache (``--use_cache``) are not among them.
        """
        assert self._sparse is not None
        arguments = self._arguments
        kernels = sorted({kernel_of(layer) for layer in self._sparse.layers.values()})
        return {
            **super().get_model_info(),
            "spon": {
                "adapter": arguments.name,
                "adapter_sha256": arguments.adapter.digest,
                "config": arguments.config(),
                "base_model": self.pretrained if isinstance(self.pretrained, str) else self.pretrained.name_or_path,
                "tokens": arguments.tokens,
                "dense_prefix": arguments.dense_prefix,
                "alpha": "on" if arguments.alpha else "off",
                "sparsity": {
                    "target": arguments.adapter.fields.sparsity,
                    **self.counts.report(self.counts.totals() + self._others),
                },
                "kernel": ", ".join(kernels),
                "spon_plugin": __version__,
            },
        }
