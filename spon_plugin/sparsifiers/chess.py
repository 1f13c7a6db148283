# SPDX-License-Identifier: Apache-2.0
"""CHESS (arXiv 2409.01366, github.com/junhuihe-hjh/CHESS): the gate decides, by one threshold per channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.calibration.histogram import MagnitudeHistogram
from spon_plugin.calibration.streaming import Observe, counted_rows, stream_inputs
from spon_plugin.decoder.sites import Site
from spon_plugin.decoder.sparsity import SparsityCounter
from spon_plugin.errors import SponError
from spon_plugin.masking import keep_mask, zero_dropped
from spon_plugin.progress import Progress, no_progress
from spon_plugin.sparsifiers.base import Sparsifier, Statistics
from spon_plugin.sparsifiers.cats import CatsFitted, GatedMLP, gated_mlps, neurons, share_of

_QUERIES = ("q", "wq", "query")


@dataclass
class _Channels:
    """What CHESS knows of one MLP.

    Attributes:
        mlp: where it is.
        size: float64 ``[neurons]``, the sum of ``|up(x)|`` over tokens.
        tokens: how many.
        importance: the magnitudes of ``act(gate(x))_i * mean_i``.
    """

    mlp: GatedMLP
    size: Tensor | None = None
    tokens: int = 0
    importance: MagnitudeHistogram = field(default_factory=MagnitudeHistogram)

    @property
    def mean(self) -> Tensor:
        """``E|up(x)_i|``, float32 ``[neurons]``."""
        assert self.size is not None
        return (self.size / self.tokens).float()

    def see_up(self, y: Tensor, special: Tensor | None) -> None:
        """Count outputs of `up`."""
        rows = counted_rows(y, special)
        size = rows.double().abs().sum(0).cpu()
        self.size = size if self.size is None else self.size + size
        self.tokens += len(rows)

    def see_gate(self, y: Tensor, special: Tensor | None) -> None:
        """Count outputs of `gate`, when the means are known."""
        gated = self.mlp.activation(counted_rows(y, special)).float()
        self.importance.update(gated * self.mean.to(gated.device))

    def thresholds(self, share: float) -> Tensor:
        """``tau / E|up(x)_i|``, float32 ``[neurons]``, below which a share of all gates lies."""
        # A channel that `up` never moves is off whatever its gate: its threshold is the largest number there is.
        return (self.importance.quantile(share) / self.mean).nan_to_num(0.0, posinf=torch.finfo(torch.float32).max)


class ChessFitted(CatsFitted):
    """See `Chess`.

    Attributes:
        inputs: site name -> float32 ``[1]``, the thresholds of the attention's inputs.
    """

    def __init__(
        self,
        name: str,
        statistics: Statistics,
        sparsity: float,
        mlps: list[GatedMLP],
        thresholds: dict[str, Tensor],
        attention: Sequence[Site],
        inputs: Mapping[str, Tensor],
    ) -> None:
        super().__init__(name, statistics, sparsity, mlps, thresholds)
        self.inputs = dict(inputs)
        masked = {path: site for site in attention for path in site.modules}
        self.site_of = {**self.site_of, **masked}
        covered = {*masked, *self.modules}
        self.modules = tuple(path for path in self.site_of if path in covered)

    def sparse_input(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `SparseMethod.sparse_input`."""
        threshold = self.inputs.get(site.name)
        if threshold is None:
            return super().sparse_input(site, x)
        keep = keep_mask(x, threshold.to(x.device))
        return zero_dropped(x, keep), keep

    def drops(self, counter: SparsityCounter) -> dict[str, float]:
        """See `Fitted.drops`."""
        counted = counter.per_module()
        own = {path: counted.get(path, 0.0) for path in self.modules if self.site_of[path].name in self.inputs}
        return {**super().drops(counter), **own}

    @property
    def mask_bytes(self) -> int:
        """Of the thresholds."""
        return super().mask_bytes + 4 * len(self.inputs)


class Chess(Sparsifier):
    """``down(m * act(gate(x)) * up(x))`` with ``m_i = |act(gate(x))_i| > tau / E|up(x)_i|``; evaluation only.

    Channel-wise thresholding: tau is the quantile of the importance ``|act(gate(x))_i| E|up(x)_i|`` over all channels
    of a layer. Selective sparsification: the inputs of the query and output projections are masked by one threshold
    each, the quantile of their magnitudes; keys and values stay dense. Formulas and the choice of projections are those
    of the released code (``CHESS/notebooks/thresholds.py``, and ``CHESS+`` in ``CHESS/models/llama.py``); the paper
    calls it CHESS with attention sparsification.

    Deviations: all four shares are one, so that the model-wide target holds with keys, values and gates dense (the
    released code takes the target for the share itself); quantiles are over all calibration tokens, where the code
    averages those of its samples, and are read from histograms whose bins are 1/128 of a value wide.
    """

    name, title, universal = "chess", "CHESS", False

    def output_observers(self, model: nn.Module, statistics: Statistics) -> dict[str, Observe]:
        """See `Sparsifier.output_observers`: the sizes of `up`'s outputs."""
        channels = [_Channels(mlp) for mlp in gated_mlps(model, statistics.sites, self.name)]
        statistics.own.update({own.mlp.gate: own for own in channels})
        return {own.mlp.up: own.see_up for own in channels}

    def complete(self, model: nn.Module, statistics: Statistics, progress: Progress) -> None:
        """See `Sparsifier.complete`: a second pass, for the importance of the gates."""
        gates: dict[str, Any] = {gate: own.see_gate for gate, own in statistics.own.items()}
        stream_inputs(model, {}, statistics.windows, statistics.skip, progress=progress, outputs=gates)

    def at(
        self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress
    ) -> ChessFitted:
        """See `Sparsifier.at`."""
        sites, mlps = statistics.sites, [own.mlp for own in statistics.own.values()]
        attention = [_masked(site) for site in sites if site.role in ("attn_in", "attn_out")]
        covered = [path for site in attention for path in site.modules] + neurons(mlps)
        share = share_of(self.name, sites, covered, sparsity, "gates, keys and values")
        thresholds = {gate: own.thresholds(share) for gate, own in statistics.own.items()}
        inputs = {
            masked.name: torch.tensor([statistics.histograms[f"{masked.block}.{masked.role}"].quantile(share)])
            for masked in attention
        }
        return ChessFitted(self.name, statistics, sparsity, mlps, thresholds, attention, inputs)


def _masked(site: Site) -> Site:
    """The part of an attention's site that is masked: the query projection alone, or the output projection."""
    if site.role == "attn_out":
        return site
    pairs = zip(site.modules, site.module_weights, strict=True)
    query = [(path, count) for path, count in pairs if path.rpartition(".")[2].partition("_")[0] in _QUERIES]
    if len(query) != 1:
        raise SponError.of("method", "chess", f"a method for this model: {site.block} has no query projection alone")
    path, count = query[0]
    return replace(site, name=path, modules=(path,), module_weights=(count,))
