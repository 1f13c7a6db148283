# SPDX-License-Identifier: Apache-2.0
"""Load a dense model by what users call it: a directory, a hub name, a `.gguf` file or a directory with one in it."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spon_plugin import machine
from spon_plugin.adapter.merged import QUANT_METHOD
from spon_plugin.errors import SponError
from spon_plugin.files import user_path
from spon_transformers.gguf_metadata import read_metadata

DTYPES: dict[str, torch.dtype | None] = {"auto": None, **machine.DTYPES}
"""What ``--dtype`` takes; ``auto`` follows the machine."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: what `from_pretrained` takes.

    Attributes:
        name: a directory or a hub name.
        gguf_file: the file inside it, for GGUF weights.
    """

    name: str
    gguf_file: str | None = None

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def model_source(name: str) -> ModelSource:
    """Understand a user's MODEL argument.

    Raises:
        SponError: a path that does not exist, a directory with neither `config.json` nor exactly one `.gguf` file, or a
            file that is not GGUF.
    """
    path = user_path(name, "model")
    if path.is_file():
        if path.suffix != ".gguf":
            raise SponError.of("model", name, "a directory, a hub name or a .gguf file")
        return ModelSource(str(path.parent), path.name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return ModelSource(str(path))
        files = sorted(file.name for file in path.glob("*.gguf"))
        if len(files) != 1:
            found = ", ".join(files) or "neither"
            raise SponError.of("model", name, f"a directory with config.json or one .gguf file in it (found {found})")
        return ModelSource(str(path), files[0])
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise SponError.of("model", name, "a directory or file that exists, or a hub name such as org/model")
    return ModelSource(name)


def load_model(
    name: str,
    dtype: str = "auto",
    device: str | None = None,
    stored: bool = False,
    trust_remote_code: bool = False,
    blocks: bool = False,
) -> Any:
    """Load a causal language model for evaluation.

    Args:
        name: see `model_source`.
        dtype: ``auto`` (the checkpoint's own, bfloat16 for GGUF; on a CPU that emulates it, its values in float32),
            ``float32``, ``bfloat16`` or ``float16``.
        device: where to put it; the first accelerator, else the CPU, by default.
        stored: ``auto`` is the checkpoint's own dtype, whatever the machine multiplies.
        trust_remote_code: run Python code that comes with the model.
        blocks: keep the blocks of a `.gguf` file in the linears; see `spon_transformers.gguf`.

    Returns:
        A `PreTrainedModel` in eval mode, without gradients.

    Raises:
        SponError: the model cannot be found, read, or is no causal language model; as `whole_model`.
    """
    if dtype not in DTYPES:
        raise SponError.of("dtype", dtype, "one of " + ", ".join(DTYPES))
    source = model_source(name)
    wanted = DTYPES[dtype] or (torch.bfloat16 if source.gguf_file else "auto")
    try:
        model = whole_model(source, dtype=wanted, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise refused(name, "a causal language model that transformers can load", error) from error
    if source.gguf_file:
        _forget_gguf(model)
        if blocks:
            from spon_transformers.gguf import keep_blocks

            keep_blocks(model, Path(source.name, source.gguf_file))
    model = model.to(device or best_device()).eval().requires_grad_(False)  # type: ignore[arg-type]
    return follow_machine(model) if dtype == "auto" and not stored else model


def whole_model(source: ModelSource, **kwargs: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, for a dense model all of whose weights are there.

    Args:
        source: where it is.
        **kwargs: for `from_pretrained`.

    Raises:
        SponError: the checkpoint is a merged one, or lacks tensors, which transformers would draw at random.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = str(Path(source.name, source.gguf_file or ""))
    if source.gguf_file is None:
        config = AutoConfig.from_pretrained(source.name, trust_remote_code=kwargs.get("trust_remote_code", False))
        stored = getattr(config, "quantization_config", None)
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        if method == QUANT_METHOD:
            received = f"{where}, a base merged with a SPON adapter"
            raise SponError.of("model", received, "a dense model", "Start from the base model.")
    auto: Any = AutoModelForCausalLM  # whose annotations know of no report
    model, report = auto.from_pretrained(source.name, output_loading_info=True, **source.kwargs(), **kwargs)
    missing = sorted(report["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        expected = f"all tensors of a {type(model).__name__}; without {shown} it would run on random numbers"
        raise SponError.of("model", where, expected, "Copy or download it again.")
    return model


def follow_machine(model: Any) -> Any:
    """Cast a model in place to the dtype that its device computes in; a quantized one keeps what it has.

    Args:
        model: a `PreTrainedModel` with weights of one floating dtype.

    Returns:
        The same model.
    """
    wanted = machine.compute_dtype(model.dtype, model.device)
    return model if wanted is model.dtype or getattr(model, "is_quantized", False) else model.to(wanted)


@torch.no_grad()
def untie_head(model: Any) -> None:
    """Give a head that shares the embeddings' weights a copy of its own, and say so in the config.

    Args:
        model: a `PreTrainedModel`.
    """
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model.

    That of a `.gguf` file begins texts with a special token where the file asks for it, which transformers leaves out;
    Gemma without it is another model.

    Args:
        name: see `model_source`.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        SponError: it cannot be found or read.
    """
    from transformers import AutoTokenizer

    source = model_source(name)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            source.name, trust_remote_code=trust_remote_code, **source.kwargs()
        )
        if source.gguf_file:
            begins = read_metadata(Path(source.name, source.gguf_file), "tokenizer.ggml.add_bos_token")
            if begins is not None and getattr(tokenizer, "add_bos_token", None) is not None:
                tokenizer.add_bos_token = begins
        tokenizer("a")  # some wrong configs show at the first text only
        return tokenizer
    except Exception as error:
        raise refused(name, "a model with a tokenizer", error) from error


def refused(name: str, expected: str, error: Exception) -> Exception:
    """What to raise where a model's files are at fault, which transformers, safetensors and others each say their way.

    Args:
        name: the model's.
        expected: what it should have been.
        error: as it was raised. One that does not come from the files is given back: ours, memory, the disk.
    """
    no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    no_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    if isinstance(error, SponError) or no_memory or no_disk:
        return error
    custom = "trust_remote_code" in str(error)
    line = "it comes with code of its own" if custom else _line(error)
    remedy = "If you trust that code: --trust-remote-code, or trust_remote_code=True." if custom else ""
    return SponError.of("model", name, f"{expected} ({line})", remedy)


def _forget_gguf(model: Any) -> None:
    """The weights are plain tensors by now; a left-over marker would stop `save_pretrained` and PEFT."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def best_device() -> str:
    """The first accelerator, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True) if hasattr(torch, "accelerator") else None
    return str(accelerator) if accelerator is not None else "cpu"


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
