# SPDX-License-Identifier: Apache-2.0
"""A package of somebody else that brings a sparsification method: one file, one row of metadata."""

from pathlib import Path

NAME = "half-channel"
MODULE = '''
"""Every other channel is masked at twice the quantile, the others at half of it."""
import torch

from spon_plugin import Mask
from spon_plugin.sparsifiers import ThresholdFitted, ThresholdSparsifier


class HalfChannel(ThresholdSparsifier):
    name, title = "half-channel", "Half by channel"

    def at(self, model, statistics, sparsity, progress=lambda done, total: None):
        masks = {}
        for site in statistics.sites:
            threshold = torch.full((site.in_features,), statistics.histograms[site.name].quantile(sparsity))
            threshold[::2] *= 2
            threshold[1::2] /= 2
            masks[site.name] = Mask(threshold)
        return ThresholdFitted(self.name, statistics, sparsity, masks)


'''


def install(folder: Path, target: str = "a_stranger:HalfChannel", name: str = NAME, module: str | None = None) -> Path:
    """Write the package into `folder`, which is to be put on the path; returns the folder."""
    info = folder / "a_stranger-1.0.dist-info"
    info.mkdir(parents=True)
    body = MODULE if module is None else module
    (folder / "a_stranger.py").write_text(body, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-stranger\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[spon.sparsifiers]\n{name} = {target}\n", encoding="utf-8")
    return folder
