# SPDX-License-Identifier: Apache-2.0
"""What every sparsification method is: calibrated once, fitted at any sparsity, attached to run a model under it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from spon_plugin.adapter.adapter import Adapter
from spon_plugin.adapter.config import SponFields
from spon_plugin.calibration.histogram import MagnitudeHistogram
from spon_plugin.calibration.streaming import SINKS, Observe, counted_rows, stream_inputs
from spon_plugin.decoder.attachment import SparseMethod
from spon_plugin.decoder.sites import Site, module_weights
from spon_plugin.errors import SponError
from spon_plugin.masking import check_sparsity
from spon_plugin.progress import Progress, no_progress
from spon_plugin.weights import Opaque, linear_features, weight_of


@dataclass
class Statistics:
    """What one pass over the calibration text found; serves every sparsity.

    Attributes:
        sites: the sites that were watched.
        windows: token ids ``[count, length]`` that were read.
        dense_prefix: first positions of a sequence that stay dense.
        skip: first positions of each window that were left out.
        histograms: site name -> magnitudes of the site's input.
        own: site name -> what the method itself collected.
        static: whether the method is, see `Sparsifier`.
    """

    sites: list[Site]
    windows: Tensor
    dense_prefix: int
    skip: int
    histograms: dict[str, MagnitudeHistogram]
    own: dict[str, Any] = field(default_factory=dict)
    static: bool = False


def linear_by_linear(statistics: Statistics) -> Statistics:
    """The same statistics, with a site for every linear, named after it: for methods that share no mask."""
    alone = [
        (site, replace(site, name=path, modules=(path,), module_weights=(weights,)))
        for site in statistics.sites
        for path, weights in zip(site.modules, site.module_weights, strict=True)
    ]
    histograms = {own.name: statistics.histograms[site.name] for site, own in alone}
    return replace(statistics, sites=[own for _, own in alone], histograms=histograms)


class Sparsifier(ABC):
    """A sparsification method.

    Attributes:
        name: as `get_sparsifier` knows it.
        title: as tables show it.
        static: whether it drops the same for every token, so that no position is left out in calibration or dense in
            use.
        universal: whether it covers every linear of any decoder at any sparsity.
    """

    name: str
    title: str
    static = False
    universal = True

    def calibrate(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        windows: Tensor,
        dense_prefix: int = 0,
        progress: Progress = no_progress,
        skip: int = SINKS,
    ) -> Statistics:
        """Read the calibration text once, with the dense model.

        Args:
            model: a dense decoder.
            sites: from `find_sites`.
            windows: token ids, int64 ``[count, length]``, without padding.
            dense_prefix: first positions of a sequence that stay dense; none where the method is static.
            progress: called after each forward pass.
            skip: first positions of each window that are left out, beside the dense ones; none where the method is
                static.

        Raises:
            SponError: the windows are too short, or the method cannot be used on this model.
        """
        dense_prefix, skip = (0, 0) if self.static else (dense_prefix, max(skip, dense_prefix))
        histograms = {site.name: MagnitudeHistogram() for site in sites}
        statistics = Statistics(list(sites), windows, dense_prefix, skip, histograms, static=self.static)
        observers: dict[str, Observe] = {}
        for site in sites:
            own = self.observer(model, site, statistics)
            if own is not None:
                statistics.own[site.name] = own
            observers[site.modules[0]] = _both(statistics.histograms[site.name], own)
        outputs = self.output_observers(model, statistics)
        stream_inputs(model, observers, windows, skip, progress=progress, outputs=outputs)
        self.complete(model, statistics, progress)
        return statistics

    @classmethod
    def of(cls, parameter: str) -> Sparsifier:
        """The method with a parameter, which is asked for as ``name:parameter``.

        Raises:
            SponError: it takes none, or not this one.
        """
        raise SponError.of("method", f"{cls.name}:{parameter}", f"{cls.name} alone, as it has no parameter")

    def observer(self, model: nn.Module, site: Site, statistics: Statistics) -> Any:
        """What sees the site's input beside the histogram of magnitudes: an object with ``update(rows)``, or None."""
        return None

    def output_observers(self, model: nn.Module, statistics: Statistics) -> dict[str, Observe]:
        """Module path -> what sees the outputs of that module."""
        return {}

    def complete(self, model: nn.Module, statistics: Statistics, progress: Progress) -> None:
        """Add to `Statistics.own` what a pass over the inputs cannot see; nothing by default."""
        return

    @abstractmethod
    def at(self, model: nn.Module, statistics: Statistics, sparsity: float, progress: Progress = no_progress) -> Fitted:
        """Fit at one sparsity, in [0, 1).

        Args:
            model: the dense decoder.
            statistics: of `calibrate`.
            sparsity: the target.
            progress: called as the work goes on, where there is more than arithmetic to do.

        Raises:
            SponError: the method cannot reach it on this model.
        """

    def fit(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        windows: Tensor,
        sparsity: float,
        dense_prefix: int = 0,
        progress: Progress = no_progress,
        skip: int = SINKS,
    ) -> Fitted:
        """`calibrate` and `at` in one call.

        Raises:
            SponError: see both.
        """
        check_sparsity(sparsity)
        return self.at(model, self.calibrate(model, sites, windows, dense_prefix, progress, skip), sparsity, progress)


def _both(histogram: MagnitudeHistogram, own: Any) -> Observe:
    def observe(x: Tensor, special: Tensor | None) -> None:
        rows = counted_rows(x, special)
        histogram.update(rows)
        if own is not None:
            own.update(rows)

    return observe


class Fitted(SparseMethod):
    """A method at one sparsity, for one model.

    Attributes:
        name: the method's.
        sites: of the whole model; the model-wide sparsity is a share of their weights.
        sparsity: the target.
        static: whether the method is, see `Sparsifier`.
        dense_prefix: first positions of a sequence that stay dense; 0 where the method is static.
        skip: first positions of a window that statistics leave out.
        quantiles: module path -> the magnitude below which a share `sparsity` of the layer's inputs lies.
        scales: module path -> the unit of alpha's learning rate (`Recipe.relative`): the quantile, unless the method
            says otherwise.
        modules: paths of the linears that the method sparsifies, which can carry an alpha.
        centers: module path -> float32 ``[in_features]``, what the method puts where it drops an entry; zero elsewhere.
    """

    def __init__(self, name: str, statistics: Statistics, sparsity: float) -> None:
        self.name = name
        self.sites = statistics.sites
        self.sparsity = check_sparsity(sparsity)
        self.static, self.dense_prefix, self.skip = statistics.static, statistics.dense_prefix, statistics.skip
        quantiles = {site.name: statistics.histograms[site.name].quantile(sparsity) for site in self.sites}
        self.site_of = {path: site for site in self.sites for path in site.modules}
        self.quantiles = {path: quantiles[site.name] for path, site in self.site_of.items()}
        self.scales = dict(self.quantiles)
        self.modules = tuple(self.site_of)
        self.weights = module_weights(self.sites)
        self.centers: dict[str, Tensor] = {}

    def with_dense_prefix(self, count: int) -> Fitted:
        """The same, with the first `count` positions of a sequence dense; a static method has none."""
        other = copy.copy(self)
        other.dense_prefix = 0 if self.static else count
        return other

    def extra_bytes(self, model: nn.Module, carriers: Collection[str] = ()) -> int:
        """Bytes that the method keeps beside the dense weights, over all blocks.

        Args:
            model: gives the dtype of the weights.
            carriers: paths of the linears with an alpha, which becomes a bias where there is none yet.
        """
        size = next(model.parameters()).element_size()
        total = self.extra_reads * size + self.mask_bytes
        for path in self.modules:
            module: Any = model.get_submodule(path)
            if (path in carriers or path in self.centers) and module.bias is None:
                total += size * linear_features(module)[1]
        return total

    @property
    def mask_bytes(self) -> int:
        """Bytes of thresholds and the like."""
        return 0

    def adapter(
        self,
        alphas: Mapping[str, Tensor] | None = None,
        fields: SponFields | None = None,
        peft: Mapping[str, Any] | None = None,
    ) -> Adapter:
        """This method as an adapter, for the kernels and hosts.

        Args:
            alphas: module path -> float32 ``[in_features]``.
            fields: `alpha_modules` and `calibration`; by default those of `alphas`.
            peft: PEFT's part of the config.

        Raises:
            SponError: the format cannot hold the method.
        """
        remedy = "It is for evaluation only."
        raise SponError.of("method", self.name, "one that masks inputs by thresholds", remedy)


def readable_weight(model: nn.Module, path: str) -> Tensor:
    """The weight of a linear as ``[out_features, in_features]``: a view of a floating-point one, otherwise decoded.

    Raises:
        SponError: its values cannot be read; see `weights.weight_of`.
    """
    weight = weight_of(model.get_submodule(path))
    if isinstance(weight, Opaque) and weight.decode is None:
        remedy = "This method needs the weights; use one that masks by the input alone (teal, scap)."
        raise SponError.of(f"{path}: weight", weight.reason, "one whose values can be read", remedy)
    return weight.dense().detach().t()
