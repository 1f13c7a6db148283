# SPDX-License-Identifier: Apache-2.0
"""What a worker says once its layers are ready: one line on what it serves, and one on what stays dense."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from vllm.logger import init_logger

from spon_plugin.errors import SponError
from spon_vllm import crossover, metrics, steps
from spon_vllm.settings import BESIDE, MEASURED, ROWS, Settings
from spon_vllm.trained import REMEDY

logger = init_logger("vllm.spon")

_HELD = {ROWS: "in rows, one copy", BESIDE: "in rows beside the base's own"}


class Served(Protocol):
    """What is asked of `spon_vllm.config.SponConfig`."""

    settings: Settings | None

    @property
    def names(self) -> Mapping[str, str]:
        """The adapter's linears, as vLLM names them."""

    @property
    def trained(self) -> Mapping[str, Any]:
        """The modules that the adapter has trained as a whole."""


def _most(settings: Settings) -> int:
    """`max_sparse_tokens` as it is served."""
    return steps.measured() if settings.measures else settings.max_sparse_tokens


@dataclass
class Coverage:
    """Which of a model's layers are sparse, counted while vLLM makes and fills them.

    Attributes:
        made: layers that have been made.
        ready: layers whose weights are in place.
        modules: the adapter's linears in them.
        extra_bytes: memory that the sparse layers add: thresholds, centres and biases.
        layers: those that are ready, until all are.
        thresholds: the layers' own, in order.
        trained: the embedding and output head that take their weights from the adapter.
        held: (`ROWS` or `BESIDE`, format, kernel) -> how many layers hold a quantized weight so, and the bytes that our
            kernels read.
        heads: the output heads that are rounded to int8 once they are loaded.
        fallback: the base's own method that cannot run here, and why; empty for none.
    """

    made: int = 0
    ready: int = 0
    modules: set[str] = field(default_factory=set)
    extra_bytes: int = 0
    layers: list[Any] = field(default_factory=list)
    thresholds: list[Tensor] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)
    held: dict[tuple[str, str, str], tuple[int, int]] = field(default_factory=dict)
    heads: list[weakref.ref[Any]] = field(default_factory=list)
    fallback: str = ""

    def add(self, modules: Iterable[str]) -> None:
        """A layer for `modules` has been made."""
        self.made += 1
        self.modules.update(modules)

    def hold(self, weights: str, format: str, kernel: str, size: int, method: type, reason: str) -> None:
        """A layer holds a quantized weight for our kernels.

        Args:
            weights: `ROWS` or `BESIDE`.
            format: of the weight.
            kernel: that a token's step runs.
            size: bytes of the weight, scales included.
            method: the base's own.
            reason: why that cannot run here; empty where it can.
        """
        layers, bytes_ = self.held.get((weights, format, kernel), (0, 0))
        self.held[weights, format, kernel] = layers + 1, bytes_ + size
        if weights == BESIDE:
            self.extra_bytes += size
        if reason and not self.fallback:
            self.fallback = f"{method.__name__} ({reason})"

    def finish(self, layer: Any, extra_bytes: int, config: Served, speaks: bool, whole: bool) -> None:
        """A layer is ready; after the last one, measure, count and log. When weights are loaded again, nothing happens.

        Args:
            layer: vLLM's.
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
        self.layers.append(layer)
        self.thresholds.append(layer.spon_threshold)
        if self.ready != self.made:
            return
        layers, self.layers = self.layers, []
        settings = config.settings
        if settings is not None and settings.limit == MEASURED:
            crossover.settle(layers, settings, speaks)
        metrics.COUNTERS.watch(self.thresholds)
        left_out = sorted(config.trained.keys() - self.trained)
        if left_out and whole:
            raise SponError.of("modules_to_save", left_out[0], "none: vLLM's model makes this layer by itself", REMEDY)
        if not speaks or settings is None:
            return
        logger.info("%s", self.line(settings))
        if self.fallback:
            logger.warning(
                "SPON: the base's own method cannot run here: %s. Its weights are served by SPON's kernels alone, "
                "prompts and dense steps included.",
                self.fallback,
            )
        if settings.token_mode == "decode" and not steps.served_limit(_most(settings)):
            logger.warning(
                "SPON: every step runs dense: the smallest CUDA graph is for more tokens than max_sparse_tokens, %d. "
                "Add a size to --cudagraph-capture-sizes, or raise max_sparse_tokens.",
                _most(settings),
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
            served = steps.served_limit(_most(settings))
            mode += f" (sparse in decoding steps of up to {served} token{'s' * (served != 1)}, dense else)"
        extra = self.extra_bytes + sum(size for size, _, tied in self._head_bytes() if tied)
        return (
            f"SPON: adapter {source}, digest {settings.digest[:12]}, target sparsity {settings.sparsity:.0%}, "
            f"{len(self.modules)} linears in {self.made} layers, tokens: {mode}, "
            f"extra memory {extra / 2**20:.2f} MiB per worker{self._weights()}{self._head()}"
        )

    def _head_bytes(self) -> list[tuple[int, int, bool]]:
        """Of each rounded head: bytes in int8, in its own precision, and whether it is tied."""
        heads = [head for head in (reference() for reference in self.heads) if head is not None]
        shapes = [(head.num_embeddings_per_partition, head.embedding_dim, head) for head in heads]
        return [(n * (d + 4), n * d * head.params_dtype.itemsize, head.quant_method.tied) for n, d, head in shapes]

    def _head(self) -> str:
        """How the output head is held; one that the host has taken out of the model is not there."""
        return "".join(
            f", output head in int8 ({size / 2**20:.1f} MiB, {'beside the embedding of' if tied else 'instead of'} "
            f"{own / 2**20:.1f})"
            for size, own, tied in self._head_bytes()
        )

    def _weights(self) -> str:
        """How quantized weights are held."""
        parts = [
            f"{layers} layers of {format} {_HELD[weights]} ({size / 2**20:.1f} MiB, kernel: {kernel})"
            for (weights, format, kernel), (layers, size) in self.held.items()
        ]
        return ", weights: " + ", ".join(parts) if parts else ""
