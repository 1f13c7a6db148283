# SPDX-License-Identifier: Apache-2.0
"""Input sites: the sets of linears in a decoder that read the same tensor.

q, k and v read one tensor, gate and up another; a mask belongs to the tensor, so thresholds are calibrated per site.
Sites are found by running a few tokens through the model and watching which linears receive the same input, so no
table of architectures is needed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.decoder.left_dense import is_expert, read_by_parents, reads_positions, text_decoder
from spon_plugin.errors import SponError
from spon_plugin.weights.linears import is_linear, is_sparse, linear_features


@dataclass(frozen=True)
class Site:
    """A set of linears that read the same tensor.

    Attributes:
        name: path of the block and role, as ``model.layers.0.attn_in``.
        role: ``attn_in``, ``attn_out``, ``mlp_in`` or ``mlp_out``; numbered where a block has more of a kind.
        block: path of the decoder block.
        modules: paths of the linears, in the order in which the model calls them.
        in_features: length of the shared input.
        module_weights: number of weights of each linear.
    """

    name: str
    role: str
    block: str
    modules: tuple[str, ...]
    in_features: int
    module_weights: tuple[int, ...]

    @property
    def weights(self) -> int:
        """Number of weights that the linears hold together."""
        return sum(self.module_weights)


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a decoder: the members of the outermost `ModuleList` that holds most weights in linears.

    Of a multimodal model they are those of its text decoder.

    Returns:
        ``(path, block)`` in order.

    Raises:
        SponError: the model has no list of blocks with linears in them.
    """
    part, decoder = text_decoder(model)
    blocks = _blocks(part, decoder)
    if not blocks:
        raise SponError.of("model", type(model).__name__, "a decoder: a list of blocks with linear layers in them")
    return blocks


def _blocks(part: str, stack: nn.Module) -> list[tuple[str, nn.Module]]:
    """The members of the outermost `ModuleList` in `stack`, at the path `part`, that holds most weights in linears."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in stack.named_modules(prefix=part):
        if isinstance(module, nn.ModuleList) and len(module):
            weights = sum(
                features[0] * features[1] for features in (linear_features(m) for m in module.modules() if is_linear(m))
            )
            if weights and (best is None or weights > best[0]):
                best = (weights, path, module)
    if best is None:
        return []
    _, path, blocks = best
    return [(f"{path}.{index}" if path else str(index), block) for index, block in enumerate(blocks)]


def check_dense(model: nn.Module) -> None:
    """Raise `SponError` if `model` is a merged one: its masks would pass for the dense model's own doing."""
    sparse = [path for path, module in model.named_modules() if is_sparse(module)]
    if sparse:
        received = f"{type(model).__name__} with {len(sparse)} sparse layers such as {sparse[0]}"
        raise SponError.of("model", received, "a dense model", "Start from the base model, not from a merged one.")


def find_sites(model: nn.Module, target_modules: Sequence[str] | None = None, example: Any = None) -> list[Site]:
    """Find the input sites of a decoder.

    Linears outside the blocks (`lm_head`, embeddings, image and audio towers), MoE experts and routers, linears whose
    weight is multiplied by the module around them (`left_dense`), and linears that the example does not reach are left
    out, so they stay dense.

    Args:
        model: a decoder, with its weights.
        target_modules: names of linears to cover, a whole path or its end (``["down_proj"]``); all by default.
        example: keyword arguments for one forward pass; four token ids by default.

    Raises:
        SponError: a target names no linear in the blocks, or names something that is not a linear; or the model is a
            merged one.
    """
    check_dense(model)
    blocks, read = decoder_blocks(model), read_by_parents(model)
    linears = _linears_of(blocks, read)
    if target_modules is not None:
        linears = _select(model, linears, target_modules, read)
    with _watch_inputs(linears) as seen:
        # Where weights are offloaded, accelerate takes the ids to where they are wanted.
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        kwargs = example if example is not None else {"input_ids": torch.arange(4, device=device)[None]}
        training = model.training
        model.eval()
        with torch.no_grad():
            model(**kwargs)
        model.train(training)
    return [site for path, _ in blocks for site in _sites_of_block(path, linears, seen)]


def default_modules(model: nn.Module) -> list[str]:
    """Paths of the linears that are made sparse where nobody says which: those of `find_sites`, by structure alone.

    The model is not run, so a linear that text does not reach is among them. Of an encoder-decoder that reads text they
    are those of both stacks.
    """
    stacks = [text_decoder(model)]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        halves: Any = model
        reads_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
        wanted = [halves.get_encoder()] * reads_text + [halves.get_decoder()]
        stacks = [(path, module) for path, module in model.named_modules() if any(module is half for half in wanted)]
    read = read_by_parents(model)
    return [path for stack in stacks for path in _linears_of(_blocks(*stack), read)]


def _linears_of(blocks: Iterable[tuple[str, nn.Module]], read: Container[str]) -> dict[str, nn.Module]:
    """The linears in `blocks` that a mask may touch, by path; `read` holds those of `read_by_parents`."""
    return {
        f"{path}.{name}": module
        for path, block in blocks
        for name, module in block.named_modules()
        if is_linear(module) and not (is_expert(name) or reads_positions(name)) and f"{path}.{name}" not in read
    }


def module_weights(sites: Iterable[Site]) -> dict[str, int]:
    """Module path -> number of weights; a site's linears share its input, so they split by their outputs."""
    return {path: count for site in sites for path, count in zip(site.modules, site.module_weights, strict=True)}


def linear_inputs(model: nn.Module) -> dict[str, int]:
    """Module path -> in_features, of every linear in `model`; for `Adapter.check_base`."""
    return {name: linear_features(m)[0] for name, m in model.named_modules() if is_linear(m)}


def target_names(sites: Iterable[Site], model: nn.Module) -> list[str]:
    """The shortest `target_modules` for PEFT that names exactly the linears of `sites`; see `names_of`."""
    return names_of((module for site in sites for module in site.modules), model)


def names_of(modules: Iterable[str], model: nn.Module) -> list[str]:
    """Names that match the modules at these paths, and nothing else in `model`, as PEFT matches `target_modules`.

    Last names (``q_proj``), or the last two (``output.dense``) where the last one matches more; whole paths for all of
    them where that is not enough.
    """
    wanted = set(modules)
    rest = [path for path, _ in model.named_modules() if path not in wanted]
    taken = {_end(path, parts) for path in rest for parts in (1, 2)}
    names = {next((end for end in (_end(p, 1), _end(p, 2)) if end not in taken), None) for p in wanted}
    return sorted(wanted) if None in names else sorted(name for name in names if name)


def _end(path: str, parts: int) -> str:
    return ".".join(path.split(".")[-parts:])


def _select(
    model: nn.Module, linears: dict[str, nn.Module], targets: Sequence[str], read: dict[str, str]
) -> dict[str, nn.Module]:
    def matches(path: str, target: str) -> bool:
        return path == target or path.endswith("." + target)

    for target in targets:
        if any(matches(path, target) for path in linears):
            continue
        other = [(p, type(m).__name__) for p, m in model.named_modules() if matches(p, target)]
        names = ", ".join(sorted({path.rpartition(".")[2] for path in linears}))
        if other and other[0][0] in read:
            expected = (
                f"linears that are called ({names}); {read[other[0][0]]} multiplies the weight of this one itself"
            )
            raise SponError.of("target_modules", target, expected)
        if other:
            raise SponError.of(
                "target_modules", target, f"linears of the decoder's blocks ({names}), not {other[0][1]}"
            )
        raise SponError.of("target_modules", target, f"names of linears in the model: {names}")
    return {path: module for path, module in linears.items() if any(matches(path, t) for t in targets)}


@contextmanager
def _watch_inputs(linears: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that fills with path -> input tensor, in call order, while the model runs."""
    seen: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.setdefault(path, args[0])

        return hook

    handles = [module.register_forward_pre_hook(watch(path)) for path, module in linears.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _sites_of_block(block: str, linears: dict[str, nn.Module], seen: dict[str, Tensor]) -> list[Site]:
    groups: dict[tuple[int, int], list[str]] = {}
    for path, x in seen.items():
        if path.startswith(block + "."):
            # The inputs are all still referenced, so two that start at one address are one tensor (or views of it).
            groups.setdefault((x.data_ptr(), x.numel()), []).append(path)
    kinds = ["attn" if "attn" in paths[0] or "attention" in paths[0] else "mlp" for paths in groups.values()]
    sites = []
    for index, (kind, paths) in enumerate(zip(kinds, groups.values(), strict=True)):
        role = f"{kind}_{_place(kinds[:index].count(kind), kinds.count(kind))}"
        features = [linear_features(linears[path]) for path in paths]
        weights = tuple(i * o for i, o in features)
        sites.append(Site(f"{block}.{role}", role, block, tuple(paths), features[0][0], weights))
    return sites


def _place(index: int, count: int) -> str:
    if index == 0:
        return "in"
    return "out" if index == count - 1 else f"mid{index}"
