# SPDX-License-Identifier: Apache-2.0
"""What a worker says once its layers are ready: one line on what it serves, and one on what stays dense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from vllm.logger import init_logger

from spon_plugin.errors import SponError
from spon_vllm import metrics, steps
from spon_vllm.settings import Settings
from spon_vllm.trained import REMEDY

logger = init_logger("vllm.spon")


class Served(Protocol):
    """What is asked of `spon_vllm.config.SponConfig`."""

    settings: Settings | None

    @property
    def names(self) -> Mapping[str, str]:
        """The adapter's linears, as vLLM names them."""

    @property
    def trained(self) -> Mapping[str, Any]:
        """The modules that the adapter has trained as a whole."""


@dataclass
class Coverage:
    """Which of a model's layers are sparse, counted while vLLM makes and fills them.

    Attributes:
        made: layers that have been made.
        ready: layers whose weights are in place.
        modules: the adapter's linears in them.
        extra_bytes: memory that the sparse layers add: thresholds, centres and biases.
        thresholds: the layers' own, in order.
        trained: the embedding and output head that take their weights from the adapter.
    """

    made: int = 0
    ready: int = 0
    modules: set[str] = field(default_factory=set)
    extra_bytes: int = 0
    thresholds: list[Tensor] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)

    def add(self, modules: Iterable[str]) -> None:
        """A layer for `modules` has been made."""
        self.made += 1
        self.modules.update(modules)

    def finish(self, threshold: Tensor, extra_bytes: int, config: Served, speaks: bool, whole: bool) -> None:
        """A layer is ready; after the last one, count and log. When weights are loaded again, nothing happens.

        Args:
            threshold: the layer's.
            extra_bytes: what the layer adds.
            config: what is served.
            speaks: whether this worker logs; the others hold the same layers.
            whole: whether this worker holds every block of the model (no pipeline parallelism).

        Raises:
            SponError: vLLM has left out what the adapter has trained as a whole.
        """
        if self.ready == self.made:
            return
        self.ready += 1
        self.extra_bytes += extra_bytes
        self.thresholds.append(threshold)
        if self.ready != self.made:
            return
        metrics.COUNTERS.watch(self.thresholds)
        left_out = sorted(config.trained.keys() - self.trained)
        if left_out and whole:
            raise SponError.of("modules_to_save", left_out[0], "none: vLLM's model makes this layer by itself", REMEDY)
        settings = config.settings
        if not speaks or settings is None:
            return
        logger.info("%s", self.line(settings))
        if settings.token_mode == "decode" and not steps.served_limit(settings.max_sparse_tokens):
            logger.warning(
                "SPON: every step runs dense: the smallest CUDA graph is for more tokens than max_sparse_tokens, %d. "
                "Add a size to --cudagraph-capture-sizes, or raise max_sparse_tokens.",
                settings.max_sparse_tokens,
            )
        dense = sorted(set(config.names) - self.modules)
        if dense and whole:
            logger.warning(
                "SPON: %d linears of the adapter stay dense, without mask or alpha: vLLM does not compute them as "
                "plain linear layers (experts, routers, lm_head, kv_b_proj). They are %s%s",
                len(dense), ", ".join(dense[:3]), " and others." if len(dense) > 3 else ".",
            )  # fmt: skip

    def line(self, settings: Settings) -> str:
        """The line that an operator looks for."""
        source = settings.adapter or "merged into the checkpoint"
        mode = settings.token_mode
        if mode == "decode":
            served = steps.served_limit(settings.max_sparse_tokens)
            mode += f" (sparse in decoding steps of up to {served} token{'s' * (served != 1)}, dense else)"
        return (
            f"SPON: adapter {source}, digest {settings.digest[:12]}, target sparsity {settings.sparsity:.0%}, "
            f"{len(self.modules)} linears in {self.made} layers, tokens: {mode}, "
            f"extra memory {self.extra_bytes / 2**20:.2f} MiB per worker"
        )
