# SPDX-License-Identifier: Apache-2.0
"""Models of a `.gguf` file that keep its blocks: linears of four and eight bits, instead of their values in bfloat16.

transformers decodes the files of most architectures as it loads them, and may reorder rows (the queries and keys of
Llama). What it made of each linear is compared with the file's blocks, row by row: a linear takes the blocks, in that
order, where they stand for the same values, and stays as it is where they do not. No architecture is known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spon_plugin.errors import SponError
from spon_plugin.kernels import sparse_linear
from spon_plugin.weights import weight_of
from spon_plugin.weights.importers.gguf import gguf_weight
from spon_plugin.weights.importers.torch_linear import is_plain_matrix
from spon_plugin.weights.scaled import ScaledWeight
from spon_transformers.merged_layers import paths_in

METHOD = "gguf"


class GgufBlocksConfig(QuantizationConfigMixin):
    """`quantization_config` of a base whose linears hold GGUF blocks, in the `weight` tensors of safetensors files.

    Args:
        tensors: module path -> llama.cpp's number of the type of its weight.
        quant_method: always ``gguf``.
    """

    def __init__(self, tensors: Mapping[str, int] | None = None, quant_method: str = METHOD) -> None:
        self.quant_method: Any = quant_method
        self.tensors = dict(tensors or {})


class GgufBlocksQuantizer(HfQuantizer):
    """Makes room for blocks in the skeleton of a model, before transformers fills it with weights."""

    requires_calibration = True
    quantization_config: GgufBlocksConfig

    def _process_model_before_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        for path, stored in paths_in(model, self.quantization_config.tensors).items():
            ggml_type = self.quantization_config.tensors[stored]
            model.set_submodule(path, GgufBlockLinear(model.get_submodule(path), ggml_type, model.dtype))
        return model

    def is_serializable(self, **_kwargs: Any) -> bool:
        """Whether the model can be saved: yes, its blocks are tensors of bytes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: adapters on it can."""
        return True


class GgufBlockLinear(nn.Module):
    """A linear on GGUF blocks, each of whose tokens is dense.

    Args:
        linear: whose place it takes, and whose bias it has.
        ggml_type: llama.cpp's number of the type.
        dtype: of a bias that is folded into it.
        blocks: uint8 ``[out_features, bytes of a row]``; None for room on the meta device.

    Attributes:
        weight: the blocks.
        bias: ``[out_features]``, or None.
    """

    input_permutation = None
    bias: Any

    def __init__(self, linear: nn.Linear, ggml_type: int, dtype: torch.dtype, blocks: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.ggml_type, self.compute_dtype = int(ggml_type), dtype
        if blocks is None:
            blocks = torch.empty(linear.out_features, _row_bytes(ggml_type, linear.in_features), dtype=torch.uint8)
            blocks = blocks.to("meta")
        self.weight = nn.Parameter(blocks, requires_grad=False)
        self.register_parameter("bias", linear.bias)
        self._rows: ScaledWeight | None = None
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        if self._rows is None or self._rows.codes.device != self.weight.device:
            found = weight_of(self)
            assert isinstance(found, ScaledWeight)
            self._rows = found.arranged()
        nothing = torch.zeros(1, dtype=torch.float32, device=x.device)
        return sparse_linear(x, self._rows, nothing, None if self.bias is None else self.bias.float())

    def extra_repr(self) -> str:
        """Show the features and the type."""
        return f"in_features={self.in_features}, out_features={self.out_features}, ggml_type={self.ggml_type}"


@torch.no_grad()
def keep_blocks(model: Any, file: str | Path) -> dict[str, int]:
    """Put the blocks of a `.gguf` file into the linears of the model that transformers has made of it, in place.

    Args:
        model: a `PreTrainedModel`, loaded from `file` in any floating-point dtype and not changed since.
        file: the `.gguf` file.

    Returns:
        Path of each linear that now holds blocks -> llama.cpp's number of their type; the model's config says so, too.
        Linears of a type without rows, and those that hold other values, stay as they are.

    Raises:
        SponError: the package gguf is missing, or does not know the file's architecture.
    """
    kept: dict[str, int] = {}
    for path, (blocks, ggml_type) in _tensors(model, file).items():
        linear = model.get_submodule(path)
        order = _order(linear, blocks, ggml_type)
        if order is None:
            continue
        dtype = linear.weight.dtype
        own = blocks[order].to(linear.weight.device)
        model.set_submodule(path, GgufBlockLinear(linear, ggml_type, dtype, own))
        kept[path] = ggml_type
    if not kept:
        return kept
    config = GgufBlocksConfig(kept)
    model.config.quantization_config = config
    model.hf_quantizer = GgufBlocksQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, METHOD
    return kept


def _row_bytes(ggml_type: int, in_features: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size, block = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
    return in_features // size * block


def _tensors(model: Any, file: str | Path) -> dict[str, tuple[Tensor, int]]:
    """Path of each linear of the model -> what the file has under its name, uint8 ``[out, bytes]``, and its type."""
    try:
        from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFReader, get_tensor_name_map
    except ImportError as error:
        raise SponError.of("gguf file", "no package gguf", "that package", "pip install gguf") from error
    reader: Any = GGUFReader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    name = reader.get_field("general.architecture").contents()
    arch = next((arch for arch, known in MODEL_ARCH_NAMES.items() if known == name), None)
    if arch is None:
        raise SponError.of("gguf file", name, "an architecture that the package gguf knows", "pip install -U gguf")
    names = get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    floats = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
    found = {}
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or module is head or not is_plain_matrix(module.weight):
            continue
        tensor = stored.get(f"{names.get_name(path)}.weight")
        if tensor is not None and tensor.tensor_type not in floats and len(tensor.shape) == 2:
            blocks = torch.from_numpy(tensor.data.copy()).view(torch.uint8)
            found[path] = blocks, int(tensor.tensor_type)
    return found


def _order(linear: Any, blocks: Tensor, ggml_type: int) -> Tensor | None:
    """Which row of blocks each output of `linear` is; None where they are not its values."""
    held = linear.weight.detach().cpu().contiguous()
    try:
        values = gguf_weight(blocks, ggml_type, linear.in_features).dense(held.dtype).t().contiguous()
    except SponError:  # a type without a counterpart
        return None
    if values.shape != held.shape:
        return None
    if torch.equal(values, held):
        return torch.arange(len(held))
    place = {row.tobytes(): i for i, row in enumerate(values.view(torch.uint8).numpy())}
    rows = [place.get(row.tobytes()) for row in held.view(torch.uint8).numpy()]
    return None if None in rows else torch.tensor(rows)
