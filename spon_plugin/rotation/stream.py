# SPDX-License-Identifier: Apache-2.0
"""A decoder's residual stream: what writes to it and reads from it, and how to turn it.

Between blocks that normalize by the root mean square of their input, the stream's coordinates are a matter of choice:
``norm(h Q) = norm(h) Q`` for every orthogonal `Q`, once the norm's gains are in the weights behind it (SliceGPT, arXiv
2401.15024; QuaRot, arXiv 2404.00456). Then embeddings and every linear that writes are turned by `Q`, every linear that
reads by its inverse, and the model says what it said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.decoder.sites import Site, decoder_blocks, find_sites
from spon_plugin.errors import SponError

_REMEDY = "Models of Llama's kind can be rotated: Llama, Mistral, Qwen2 and 3, Phi-3, SmolLM."


@dataclass(frozen=True)
class ResidualStream:
    """The parts of a model that touch its residual stream.

    Attributes:
        embedding: what begins it, ``[vocabulary, hidden]``.
        readers: path of each norm on it -> paths of the linears that read what it gives, the output head among them.
        writers: paths of the linears in the blocks that add to it.
        sites: the input sites of masks that are among the readers.
    """

    embedding: nn.Embedding
    readers: dict[str, tuple[str, ...]]
    writers: tuple[str, ...]
    sites: tuple[Site, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, embedding: nn.Module, head: nn.Module) -> ResidualStream:
        """Find them by running four tokens.

        Whether nothing else touches the stream is for `check` to see.

        Args:
            model: a decoder that maps ``input_ids=``.
            embedding: of its tokens.
            head: its output head, with weights of its own.

        Raises:
            SponError: the embedding is no `nn.Embedding`, the head and the masked linears are no `nn.Linear` in
                floating point, or no norm on the stream feeds a linear.
        """
        if not isinstance(embedding, nn.Embedding):
            raise SponError.of("embedding", type(embedding).__name__, "a torch.nn.Embedding")
        hidden = embedding.weight.shape[1]
        sites = find_sites(model)
        given: dict[int, str] = {}
        read: dict[str, str] = {}
        kept: list[Tensor] = []  # so that no two of them are at one address
        linears = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear)}
        with _hooked() as hook:
            for path, module in model.named_modules():
                if isinstance(gains := getattr(module, "weight", None), Tensor) and gains.shape == (hidden,):
                    hook(module, _remember(path, given, kept), False)
            for path, linear in linears.items():
                hook(linear, _look(path, given, read), True)
            model(input_ids=torch.arange(4, device=embedding.weight.device)[None])
        readers: dict[str, tuple[str, ...]] = {}
        for path, norm in read.items():
            readers[norm] = (*readers.get(norm, ()), path)
        blocks = tuple(f"{path}." for path, _ in decoder_blocks(model))
        writers = tuple(
            path
            for path, linear in linears.items()
            if path.startswith(blocks) and path not in read and linear.out_features == hidden
        )
        masked = tuple(site for site in sites if site.modules[0] in read)
        if not masked or not any(linears[path] is head for path in read):
            received = f"{type(model).__name__}, whose linears do not read a norm of the residual stream"
            raise SponError.of("model", received, "a decoder with norms directly before its linears", _REMEDY)
        return cls(embedding, readers, writers, masked)

    @torch.no_grad()
    def fold_gains(self, model: nn.Module) -> None:
        """Put every norm's gains into the linears behind it, in place."""
        for path, names in self.readers.items():
            norm = model.get_submodule(path)
            gains = _gains(norm, self.embedding.weight)
            for name in names:
                _parameter(model, name).mul_(gains)
            for neutral in (1.0, 0.0):  # Gemma adds 1 to what it keeps
                _parameter(model, path).fill_(neutral)
                if torch.allclose(_gains(norm, self.embedding.weight), torch.ones_like(gains), atol=1e-3):
                    break

    @torch.no_grad()
    def rotate(self, model: nn.Module, rotation: Tensor) -> None:
        """Turn the stream ``h`` into ``h Q``, in place; gains must have been folded.

        Args:
            model: the model.
            rotation: `Q`, orthogonal ``[hidden, hidden]``.
        """
        weight: Tensor = self.embedding.weight
        weight.copy_(weight @ rotation.to(weight))
        for names in self.readers.values():
            for name in names:
                weight = _parameter(model, name)
                weight.copy_(weight @ rotation.to(weight))
        for name in self.writers:
            weight = _parameter(model, name)
            weight.copy_(rotation.to(weight).t() @ weight)
            bias: Any = getattr(model.get_submodule(name), "bias", None)
            if bias is not None:
                bias.copy_(bias @ rotation.to(bias))


@torch.no_grad()
def check(model: nn.Module, stream: ResidualStream, said: Callable[[], Tensor], before: Tensor) -> None:
    """Check that the stream can be turned: by a reflection, and back.

    Args:
        model: the model, float32, its gains folded.
        stream: of it.
        said: gives its logits on some tokens.
        before: the logits before gains were folded.

    Raises:
        SponError: the model says something else then, because something else touches the stream, or a norm subtracts
            the mean. Its weights are changed.
    """
    size = stream.embedding.weight.shape[1]
    normal = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(before.device)
    reflection = torch.eye(size, device=before.device) - 2 * torch.outer(normal, normal) / normal.square().sum()
    stream.rotate(model, reflection)
    error = (said() - before).abs().max() / before.abs().max()
    if not error < 1e-3:
        received = f"{type(model).__name__}, whose logits a rotation of the residual stream changes by {error:.1%}"
        raise SponError.of("model", received, "a decoder with RMS norms, and linears alone behind them", _REMEDY)
    stream.rotate(model, reflection)


def _parameter(model: nn.Module, path: str) -> Tensor:
    weight = model.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight


def _gains(norm: nn.Module, like: Tensor) -> Tensor:
    """What a norm by the root mean square multiplies its input by: that of ones is 1."""
    gains: Tensor = norm(like.new_ones(1, like.shape[1]))[0]
    return gains


def _remember(path: str, given: dict[int, str], kept: list[Tensor]) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            kept.append(output)
            given[output.data_ptr()] = path

    return hook


def _look(path: str, given: dict[int, str], read: dict[str, str]) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        norm = given.get(args[0].data_ptr()) if args and isinstance(args[0], Tensor) else None
        if norm is not None:
            read[path] = norm

    return hook


@contextmanager
def _hooked() -> Iterator[Callable[[nn.Module, Any, bool], None]]:
    """Gives a function that hooks a module, before its pass or after it; hooks are removed at the end."""
    handles: list[Any] = []

    def hook(module: nn.Module, function: Any, before: bool) -> None:
        add = module.register_forward_pre_hook if before else module.register_forward_hook
        handles.append(add(function))

    try:
        yield hook
    finally:
        for handle in handles:
            handle.remove()
