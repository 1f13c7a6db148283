# SPDX-License-Identifier: Apache-2.0
"""What the command line is tried on: a text, and an adapter for the tiny model."""

from pathlib import Path

import pytest
import torch
from commands import TEXT

from spon_plugin import Adapter, Mask, SponFields, find_sites, write_adapter


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.fixture(scope="session")
def adapter(tiny_model_dir, tmp_path_factory) -> Path:
    """Masks and random alphas for the tiny model."""
    from spon_transformers.loading import load_model

    sites = find_sites(load_model(str(tiny_model_dir), "float32"))
    inputs = {path: site.in_features for site in sites for path in site.modules}
    torch.manual_seed(0)
    masks = {path: Mask(torch.tensor([0.3]), alpha=0.1 * torch.randn(n)) for path, n in inputs.items()}
    made = Adapter(SponFields(), masks)
    directory = tmp_path_factory.mktemp("adapter") / "spon"
    write_adapter(made, directory)
    return directory
