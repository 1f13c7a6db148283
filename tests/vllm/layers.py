# SPDX-License-Identifier: Apache-2.0
"""Single layers of vLLM's, made sparse without an engine: what a test of one layer needs, in milliseconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from engines import override  # noqa: F401 (skips where vLLM is not installed)
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import BatchDescriptor, ForwardContext, override_forward_context

from spon_plugin import Mask
from spon_vllm.config import SponConfig
from spon_vllm.settings import Settings


@contextmanager
def one_process(path) -> Iterator[None]:
    """vLLM's groups of workers for this process alone."""
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    config = VllmConfig()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{path}/init", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        config.model_config = SimpleNamespace(dtype=torch.float32)  # what methods for FP8 ask of a model
        yield
    cleanup_dist_env_and_memory()


def make_layer(
    sizes: list[int],
    in_features: int,
    masks: list[Mask],
    bias: bool = False,
    inner=None,
    dtype: torch.dtype = torch.float32,
    **settings,
) -> nn.Module:
    """A model of one layer `l`, of vLLM's, that fuses linears of `sizes` outputs; nothing has filled it yet."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear

    shards = [f"shard{index}" for index in range(len(sizes))] if len(sizes) > 1 else ["l"]
    names = [f"m.{shard}" for shard in shards]
    config = SponConfig()
    given = {"adapter": "somewhere", "modules": tuple(names), "token_mode": "all", **settings}
    config.settings = Settings(**given)
    config.inner, config._masks, config._trained = inner, dict(zip(names, masks, strict=True)), {}
    config.packed_modules_mapping = {"l": shards}
    make = MergedColumnParallelLinear if len(sizes) > 1 else ReplicatedLinear
    size = sizes if len(sizes) > 1 else sizes[0]
    model = nn.Module()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model.l = make(in_features, size, bias=bias, params_dtype=dtype, quant_config=config, prefix="m.l")
    finally:
        torch.set_default_dtype(before)
    return model


def load(layer: nn.Module, **tensors: Tensor | list[Tensor]) -> None:
    """Give vLLM's loaders what a checkpoint has; a list for the linears of a fused layer."""
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        if isinstance(tensor, list):
            for index, part in enumerate(tensor):
                parameter.weight_loader(parameter, part, index)
        else:
            parameter.weight_loader(parameter, tensor)


@contextmanager
def step(
    tokens: int, real: int | None = None, *, longest: int | None = 1, mode=CUDAGraphMode.NONE, requests=None, **more
) -> Iterator[ForwardContext]:
    """A step of vLLM's with `tokens` rows, of which the last may be padding.

    Args:
        tokens: rows, padding included.
        real: rows that are tokens of requests; all by default.
        longest: the most tokens of a request; None for a step that says nothing about them.
        mode: of CUDA graphs.
        requests: how many there are, where all have as many tokens.
        more: of the `ForwardContext`.
    """
    real = tokens if real is None else real
    metadata = {} if longest is None else {"l": SimpleNamespace(max_query_len=longest, num_actual_tokens=real)}
    descriptor = BatchDescriptor(tokens, requests, uniform=requests is not None)
    padding = torch.arange(tokens) >= real
    context = ForwardContext(
        **{
            "no_compile_layers": {}, "attn_metadata": metadata, "slot_mapping": {}, "is_padding": padding,
            "cudagraph_runtime_mode": mode, "batch_descriptor": descriptor, **more,
        }
    )  # fmt: skip
    with override_forward_context(context):
        yield context
