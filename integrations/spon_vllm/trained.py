# SPDX-License-Identifier: Apache-2.0
"""What an adapter has trained as a whole (`modules_to_save`) and vLLM can serve: the embedding and the output head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from spon_plugin.adapter.directory import read_adapter
from spon_plugin.errors import SponError

REMEDY = "Save the base model with the trained modules in it, and the adapter without them."


def trained_tensors(adapter: str | Path) -> dict[str, dict[str, Tensor]]:
    """Module path -> name -> tensor of the modules that an adapter directory holds as a whole.

    Args:
        adapter: a directory.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_adapter(adapter).saved.items():
        module, _, name = key.rpartition(".")
        found.setdefault(module, {})[name] = tensor
    return found


def check_trained(trained: Mapping[str, Mapping[str, Tensor]], model: Any, tied: bool) -> None:
    """Check that vLLM can serve what an adapter has trained as a whole.

    Args:
        trained: as from `trained_tensors`.
        model: the base model in transformers, a `PreTrainedModel` without storage; None where it cannot be built.
        tied: whether the base's output head is its embedding.

    Raises:
        SponError: a module is neither the embedding nor the output head, the two are one tensor in the base, or a
            tensor has another shape.
    """
    ends = [] if model is None else [model.get_input_embeddings(), model.get_output_embeddings()]
    for path, tensors in trained.items():
        module = dict(model.named_modules()).get(path) if model is not None else None
        if module is None or not any(module is end for end in ends):
            raise SponError.of(
                "modules_to_save",
                path,
                "the embedding or the output head; vLLM would serve the base model's own",
                REMEDY,
            )
        if tied:
            raise SponError.of(
                "modules_to_save", path, "none, as the base model's embedding and output head are one tensor", REMEDY
            )
        for name, tensor in tensors.items():
            own = getattr(module, name, None)
            if own is None or own.shape != tensor.shape:
                wanted = "no such tensor" if own is None else f"shape {tuple(own.shape)}, the base model's"
                raise SponError.of(f"{path}.{name}", tuple(tensor.shape), wanted, REMEDY)


class TrainedEmbeddingMethod(UnquantizedEmbeddingMethod):
    """An embedding or output head whose weights are the adapter's, not the checkpoint's.

    Args:
        tensors: name -> tensor of the whole layer.
    """

    supports_pre_processed_weights = False

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def process_weights_after_loading(self, layer: Any) -> None:
        """`put`, and make the layer ready."""
        self.put(layer)
        super().process_weights_after_loading(layer)

    def put(self, layer: Any) -> None:
        """Put the adapter's weights, this rank's part of them, in the place of the checkpoint's."""
        for name, tensor in self.tensors.items():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor)
