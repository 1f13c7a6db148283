# SPDX-License-Identifier: Apache-2.0
"""llama.cpp beside the models of `benchmarks.decode`, through `llama-cpp-python`, on GGUF files as they are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.variants import Step, Variant


def variant(path: Path, context: int) -> Variant:
    """llama.cpp on a GGUF file, with as many threads as torch.

    Args:
        path: of the file.
        context: the most tokens that it will hold.

    Raises:
        ImportError: `llama-cpp-python` is not installed.
    """
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    model = Llama(str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)
    return Variant(
        f"llama.cpp {path.stem}",
        lambda ids: _step(model, ids),
        lambda windows: _perplexity(path, windows, threads),
        bytes_read(path),
        path.stat().st_size,
    )


def bytes_read(path: Path) -> int:
    """Bytes of the weights that a token reads: all but the embeddings, where they are not the output head, too."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)


def write(model: Any, path: Path, kind: str = "Q4_K_M") -> Path:
    """Write a Llama model of transformers as a GGUF file, rounded by llama.cpp's own quantizer.

    Args:
        model: with the architecture of Llama, dense.
        path: of the file; it has no tokenizer.
        kind: as llama.cpp names it, "F16" among them.

    Returns:
        `path`.

    Raises:
        ValueError: a model of another architecture.
    """
    import gguf
    import llama_cpp

    config, state = model.config, model.state_dict()
    if config.model_type != "llama":
        raise ValueError(f"write: {config.model_type}; expected a Llama model")
    whole = path.with_suffix(".f16.gguf")
    writer = gguf.GGUFWriter(whole, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, tensor in state.items():
        if tied and name == "lm_head.weight":
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp turns neighbours into pairs, transformers the two halves of a head
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        array = tensor.float().numpy()
        target = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(target, array.astype(np.float16) if tensor.dim() > 1 else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = torch.get_num_threads()
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(path).encode(), parameters):
        raise RuntimeError(f"llama.cpp did not quantize {whole}")
    whole.unlink()
    return path


def _step(model: Any, ids: torch.Tensor) -> Step:
    model.reset()
    model.eval(ids[0].tolist())

    def step() -> None:
        logits = np.ctypeslib.as_array(model._ctx.get_logits(), (model.n_vocab(),))
        model.eval([int(logits.argmax())])

    return step


def _perplexity(path: Path, windows: torch.Tensor, threads: int) -> float:
    """As `variants.perplexity`."""
    from llama_cpp import Llama

    length = windows.shape[1]
    model = Llama(
        str(path), n_ctx=length, n_batch=length, n_threads=threads, n_threads_batch=threads, logits_all=True,
        verbose=False,
    )  # fmt: skip
    loss, count = 0.0, 0
    for window in windows:
        model.reset()
        model.eval(window.tolist())
        logits = torch.from_numpy(np.asarray(model.scores[: length - 1], dtype=np.float32))
        loss += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        count += length - 1
    return math.exp(loss / count)
