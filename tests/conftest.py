# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several folders use: tiny random models for shapes, and SmolLM2-135M for the real thing."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tables are read from pipes, as wide as a test asks: whoever runs the tests must not turn those into terminals.
os.environ.pop("FORCE_COLOR", None)
os.environ.pop("TTY_COMPATIBLE", None)
os.environ.pop("TTY_INTERACTIVE", None)

import pytest
import torch
from tiny_models import make_byte_tokenizer, make_tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from spon_plugin import Adapter, Mask, SponFields, find_sites, write_adapter


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    return make_tiny_llama()


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return make_byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, as a directory."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_tiny_llama().save_pretrained(path)
    make_byte_tokenizer().save_pretrained(path)
    return path


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


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in bfloat16, as a transformers directory."""
    from spon_transformers.loading import load_model, load_tokenizer
    from spon_transformers.smollm2 import smollm2_gguf

    path = tmp_path_factory.mktemp("models") / "smollm2"
    gguf = str(smollm2_gguf())
    load_model(gguf, "bfloat16").save_pretrained(path)
    load_tokenizer(gguf).save_pretrained(path)
    return path


@pytest.fixture
def smollm2(smollm2_dir: Path):
    """SmolLM2-135M in float32."""
    return AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval().requires_grad_(False)
