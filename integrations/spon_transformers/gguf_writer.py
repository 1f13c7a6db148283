# SPDX-License-Identifier: Apache-2.0
"""Write a model of transformers as a `.gguf` file, and have llama.cpp's own quantizer round it.

For comparisons: the file has weights and what transformers' importer asks for, and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from spon_plugin.errors import SponError

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "gemma3_text": "gemma3"}
"""transformers' name of an architecture -> llama.cpp's."""

_GEMMA_DEFAULTS = (
    "layer_types", "rope_parameters", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "hidden_activation", "attention_bias", "use_bidirectional_attention",
)  # fmt: skip
"""What a `.gguf` file of Gemma 3 does not say."""
_PREFIX = "LLAMA_FTYPE_MOSTLY_"


def gguf_kinds() -> list[str]:
    """What llama.cpp rounds to without an importance matrix, as it calls them, such as ``Q4_K_M``.

    Raises:
        SponError: llama-cpp-python is not installed.
    """
    names = [name.removeprefix(_PREFIX) for name in dir(_llama_cpp()) if name.startswith(_PREFIX)]
    return [name for name in names if (name[0] == "Q" and name[1:2] in "345678") or name in ("Q2_K", "BF16", "F16")]


def check_kind(kind: str) -> None:
    """Raise `SponError` for a kind that llama.cpp does not have, or if llama-cpp-python is not installed."""
    known = gguf_kinds()
    if kind not in known:
        raise SponError.of("format", f"gguf:{kind}", "gguf: and one of " + ", ".join(known))


def check_architecture(model: Any) -> None:
    """Raise `SponError` for a model that this writer does not know."""
    config = model.config
    if config.model_type not in ARCHITECTURES:
        expected = f"for a .gguf file, one of {', '.join(ARCHITECTURES)}"
        raise SponError.of("model", config.model_type, expected, "Convert it with llama.cpp's script.")
    if config.model_type == "llama" and (config.attention_bias or config.mlp_bias):
        raise SponError.of("model", "a Llama with biases", "for a .gguf file, one without, which alone is read back")
    if config.model_type == "gemma3_text":
        _check_gemma(config)
        return
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope != "default":
        raise SponError.of("model", f"rope_type {rope}", "for a .gguf file, plain rotary positions")


@torch.no_grad()
def write_gguf(model: Any, file: Path, kind: str = "Q4_K_M") -> Path:
    """Write a model as a `.gguf` file.

    Args:
        model: a dense `PreTrainedModel` of one of `ARCHITECTURES`.
        file: to write.
        kind: ``BF16``, or what llama.cpp rounds to from that. It takes another type for tensors whose rows do not
            divide by a block (256 for k-quants): some of 5 bits in the place of 4, and of 4 in that of 2 or 3.

    Returns:
        `file`.

    Raises:
        SponError: see `check_kind` and `check_architecture`, or llama.cpp refuses the model.
    """
    check_architecture(model)
    if kind == "BF16":
        _write(model, file)
        return file
    check_kind(kind)
    with TemporaryDirectory(dir=file.parent) as directory:
        whole = Path(directory, "bf16.gguf")
        _write(model, whole)
        llama_cpp = _llama_cpp()
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, _PREFIX + kind)
        parameters.nthread = torch.get_num_threads()
        quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(quiet, None)
        try:
            failed = llama_cpp.llama_model_quantize(str(whole).encode(), str(file).encode(), parameters)
        finally:
            llama_cpp.llama_log_set(_log_of_the_package(llama_cpp), None)
    if failed:
        raise SponError.of("format", f"gguf:{kind}", "one that llama.cpp can round this model to")
    return file


def bytes_read(file: Path) -> tuple[int, int]:
    """Bytes of the weights in a `.gguf` file that a token reads, and how many weights they are.

    All but the embeddings count; and those, too, where they are the output head.
    """
    from gguf import GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]
    return sum(int(t.n_bytes) for t in tensors.values()), sum(int(t.n_elements) for t in tensors.values())


def _llama_cpp() -> Any:
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # its shared library may not load
        remedy = "pip install 'spon-plugin[llama-cpp]'"
        raise SponError.of("format", "gguf without llama-cpp-python", "that package", remedy) from error
    return llama_cpp


def _check_gemma(config: Any) -> None:
    """Raise `SponError` for a Gemma 3 whose file would be read back as another model."""
    said = {"num_hidden_layers": config.num_hidden_layers, "head_dim": config.head_dim}
    usual = type(config)(**said, rope_parameters=_gemma_rope(_rope_base(config)))
    for name in _GEMMA_DEFAULTS:
        if getattr(config, name, None) != getattr(usual, name, None):
            expected = f"for a .gguf file, {getattr(usual, name, None)}, as in every Gemma 3 of this size"
            raise SponError.of(f"model's {name}", getattr(config, name, None), expected)


def _gemma_rope(base: float) -> dict[str, Any]:
    plain = {"rope_type": "default"}
    return {
        "full_attention": {**plain, "rope_theta": base},
        "sliding_attention": {**plain, "rope_theta": 10000.0},
    }


def _rope_base(config: Any) -> float:
    """Of the layers that attend to everything."""
    rope = config.rope_parameters
    return float(rope.get("full_attention", rope)["rope_theta"])


def _log_of_the_package(llama_cpp: Any) -> Callable[..., Any] | None:
    """What llama-cpp-python has llama.cpp log by."""
    return getattr(getattr(llama_cpp, "_logger", None), "llama_log_callback", None)


def _write(model: Any, file: Path) -> None:
    """All tensors of more than one dimension in bfloat16, the others in float32."""
    import gguf

    config = model.config
    name_there = ARCHITECTURES[config.model_type]
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name_there)
    writer = gguf.GGUFWriter(file, name_there)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope_base(config))
    if config.model_type == "llama":
        writer.add_rope_dimension_count(_head_size(config))
    if config.model_type == "gemma3_text":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise SponError.of("model", name, "for a .gguf file, a tensor that llama.cpp knows")
        array = _as_llama_cpp_has_it(name, tensor, config).float().cpu().numpy()
        if array.ndim > 1:
            bf16 = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(target, gguf.quants.quantize(array, bf16), raw_dtype=bf16)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _as_llama_cpp_has_it(name: str, tensor: Tensor, config: Any) -> Tensor:
    """A tensor in the order and with the values of llama.cpp.

    Queries and keys of Llama: llama.cpp rotates neighbours, transformers the two halves of a head. Norms of Gemma:
    transformers adds one to them as it runs, the file has it in them.
    """
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return tensor.float() + 1
    parts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    heads = parts.get(name.split(".")[-2])
    if heads is None or config.model_type != "llama":
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
