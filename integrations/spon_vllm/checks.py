# SPDX-License-Identifier: Apache-2.0
"""Does the adapter fit the model? Answered from the model's configuration alone, before weights are read."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger

from spon_plugin.adapter.directory import read_adapter
from spon_plugin.decoder.left_dense import is_expert
from spon_plugin.decoder.sites import linear_inputs
from spon_plugin.errors import SponError
from spon_vllm.settings import Settings
from spon_vllm.trained import check_trained, trained_tensors

logger = init_logger("vllm.spon")


def check_fit(settings: Settings, hf_config: Any, name: str) -> None:
    """Check what can be checked at configuration time; workers check the rest when they make the layers.

    Raises:
        SponError: the adapter is for another model, names what is no linear layer, or covers a fused layer in part
            or with several centres.
    """
    model = base_model(hf_config)
    linears = None if model is None else linear_inputs(model)
    # The values of a merged checkpoint's centres are known when a worker has loaded it; which linears have one is now.
    announced = [path for path, mask in settings.announced.items() if mask.has_center]
    centers: Mapping[str, Tensor] = dict.fromkeys(announced, torch.empty(0))
    if settings.adapter is not None:
        adapter = read_adapter(settings.adapter)
        centers = {path: mask.center for path, mask in adapter.masks.items() if mask.center is not None}
        check_trained(trained_tensors(settings.adapter), model, getattr(hf_config, "tie_word_embeddings", False))
        if linears is not None:
            adapter.check_base(linears, name)
    elif dense := sorted(filter(is_left_dense, settings.announced)):
        raise SponError.of(
            f"quantization_config: threshold of {dense[0]}", "one", "none: vLLM keeps this linear dense",
            "Serve the adapter on its base model, or merge one whose target_modules leave it out.",
        )  # fmt: skip
    elif linears is not None:
        missing = [module for module in settings.announced if module not in linears]
        if missing:
            raise SponError.of(f"quantization_config: threshold of {missing[0]}", "one", "linear layers of the model")
    for fused, shards in packed_modules(hf_config).items():
        check_shards(settings.modules, fused, shards, linears)
        for parent in sorted({path.rpartition(".")[0] for path in centers}):
            check_centers({f"{parent}.{shard}": centers.get(f"{parent}.{shard}") for shard in shards}, fused)


def is_left_dense(path: str) -> bool:
    """Whether vLLM does not compute a layer as such: MLA multiplies kv_b_proj's weight into others, routers choose."""
    return path.rpartition(".")[2] == "kv_b_proj" or is_expert(path)


def check_centers(centers: Mapping[str, Tensor | None], fused: str) -> None:
    """Check that linears which vLLM computes as one layer have one centre: it is taken off their common input.

    Args:
        centers: path of each of the linears -> its centre, None for none.
        fused: the name of vLLM's layer.

    Raises:
        SponError: some have one and others none, or they differ.
    """
    if not centers:
        return
    (first, center), *others = centers.items()
    for path, other in others:
        if (other is None) != (center is None):
            with_one, without = (first, path) if other is None else (path, first)
            received = f"none, but {with_one} has one"
        elif other is not None and center is not None and not torch.equal(other, center):
            without, received = path, f"another than {first} has"
        else:
            continue
        raise SponError.of(
            f"{without}.spon_center",
            received,
            f"one centre for {', '.join(p.rpartition('.')[2] for p in centers)}, which vLLM computes in one layer, "
            f"{fused}, on one input",
            "Calibrate centres per input site, as `spon` does by default.",
        )


def check_shards(
    modules: Iterable[str], fused: str, shards: Sequence[str], linears: Mapping[str, int] | None = None
) -> None:
    """Check that linears which vLLM computes as one layer are all sparsified, or none.

    Args:
        modules: paths of the sparsified linears.
        fused: the name of vLLM's layer.
        shards: the names of the linears in it.
        linears: the linears that the model has, if they are known; others cannot be missed.

    Raises:
        SponError: a threshold is missing.
    """
    names = set(modules)
    for parent in sorted({name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in shards}):
        paths = [f"{parent}.{shard}" for shard in shards]
        missing = [path for path in paths if path not in names and (linears is None or path in linears)]
        if missing:
            raise SponError.of(
                f"{missing[0]}.spon_threshold",
                "no such tensor",
                f"one, because vLLM computes {', '.join(shards)} in one layer, {fused}",
                "Make the adapter with all of them in target_modules, or with none.",
            )


def base_model(hf_config: Any) -> nn.Module | None:
    """The base model, without storage; None where transformers cannot build it.

    vLLM depends on transformers, so nothing is installed for this.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(hf_config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
            return model
    except Exception as error:  # any failure of code that is not ours: the workers check what this cannot
        logger.debug("SPON: %s is not checked at configuration time: %s", type(config).__name__, error)
        return None


def packed_modules(hf_config: Any) -> dict[str, list[str]]:
    """Name of a fused layer -> names of the linears in it, for the model's architecture; empty where unknown."""
    from vllm.model_executor.models import ModelRegistry

    for architecture in getattr(hf_config, "architectures", None) or []:
        entry = ModelRegistry.models.get(architecture)
        try:
            mapping = getattr(entry.load_model_cls(), "packed_modules_mapping", None) if entry else None
        except Exception as error:
            logger.debug("SPON: %s is not checked at configuration time: %s", architecture, error)
            continue
        if mapping:
            return {fused: list(shards) for fused, shards in mapping.items() if len(shards) > 1}
    return {}
