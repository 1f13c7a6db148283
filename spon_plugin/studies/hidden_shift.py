# SPDX-License-Identifier: Apache-2.0
"""How far masks move a model's hidden states, layer by layer, and how much of it alpha brings back.

SPON's account of what sparsification breaks (arXiv 2512.12744, figure 3) is a shift of the hidden states. A picture
shows it; two numbers per layer measure it: linear CKA (Kornblith et al., arXiv 1905.00414), which does not see
rotations and scales, and the relative distance, which does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spon_plugin.calibration.streaming import SINKS
from spon_plugin.decoder.positions import whole_windows
from spon_plugin.decoder.sites import decoder_blocks
from spon_plugin.errors import SponError
from spon_plugin.progress import Progress, no_progress

PROJECTIONS = ("tsne", "pca")


@torch.no_grad()
def block_outputs(
    model: nn.Module, prompts: Sequence[Tensor], skip: int = SINKS, progress: Progress = no_progress
) -> list[Tensor]:
    """The hidden states after each decoder block, of the model as it is now.

    Args:
        model: a decoder; run it in a `sparse_inputs` block for its sparse states.
        prompts: token ids ``[length]`` each, of any length above `skip`.
        skip: first positions of each prompt that are left out, see `SINKS`.
        progress: called after each prompt.

    Returns:
        One tensor ``[tokens, hidden]`` per block, in the model's dtype, on the CPU; the prompts one after another.

    Raises:
        SponError: there are no prompts, or one has no token after the skipped ones.
    """
    check_prompts(prompts, skip)
    blocks = decoder_blocks(model)
    states: list[list[Tensor]] = [[] for _ in blocks]

    def keep(index: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            states[index].append(hidden[0, skip:].cpu())

        return hook

    handles = [block.register_forward_hook(keep(index)) for index, (_, block) in enumerate(blocks)]
    device = next(model.parameters()).device
    try:
        for done, prompt in enumerate(prompts, start=1):
            with whole_windows():
                model(input_ids=prompt[None].to(device), use_cache=False)
            progress(done, len(prompts))
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in states]


def check_prompts(prompts: Sequence[Tensor], skip: int) -> None:
    """Raise `SponError` if there are no prompts, or one has no token after the first `skip`."""
    shortest = min((len(prompt) for prompt in prompts), default=0)
    if shortest <= skip:
        received = f"{len(prompts)} prompts, the shortest of {shortest} tokens"
        raise SponError.of("prompts", received, f"at least one prompt, each of more than {skip} tokens")


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two sets of representations of the same tokens.

    ``||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)`` with centred columns (arXiv 1905.00414, eq. 3 and section 3): 1 for equal
    representations up to rotation and scale, 0 for orthogonal ones.

    Args:
        x: ``[tokens, features]``.
        y: ``[tokens, other features]``.
    """
    x, y = (part.double() - part.double().mean(0) for part in (x, y))
    cross, own_x, own_y = (_cross_norm(a, b) for a, b in ((x, y), (x, x), (y, y)))
    return cross**2 / (own_x * own_y) if own_x * own_y > 0 else 0.0


def _cross_norm(a: Tensor, b: Tensor) -> float:
    """``||a'b||_F``, through the smaller of the two ways to write it."""
    if a.shape[0] < max(a.shape[1], b.shape[1]):  # ||a'b||_F^2 = <aa', bb'>
        return float((a @ a.t()).mul_(b @ b.t()).sum().clamp(min=0).sqrt())
    return float((a.t() @ b).norm())


def relative_distance(states: Tensor, dense: Tensor) -> float:
    """``||h - h_dense|| / ||h_dense||``, the mean over tokens.

    Args:
        states: ``[tokens, features]``.
        dense: the same of the dense model.
    """
    states, dense = states.float(), dense.float()
    return float(((states - dense).norm(dim=1) / dense.norm(dim=1).clamp(min=1e-12)).mean())


def prompt_means(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mean state of each prompt.

    Args:
        states: ``[tokens, features]``, of one block of `block_outputs`.
        lengths: how many of the tokens belong to each prompt.

    Returns:
        float32 ``[prompts, features]``.
    """
    return torch.stack([part.float().mean(0) for part in states.split(list(lengths))])


def project(points: Tensor, method: str = "tsne", seed: int = 0) -> Tensor:
    """Points in the plane, for a picture.

    Args:
        points: float32 ``[count, features]``.
        method: ``tsne`` (scikit-learn's, from the extra ``analyze``) or ``pca``.
        seed: of t-SNE.

    Returns:
        float32 ``[count, 2]``.

    Raises:
        SponError: see `check_projection`.
    """
    check_projection(method)
    if method == "pca":
        centred = points.double() - points.double().mean(0)
        _, _, directions = torch.linalg.svd(centred, full_matrices=False)
        directions = directions[:2] * torch.sign(directions[:2].sum(1, keepdim=True))  # a sign that does not depend
        return (centred @ directions.t()).float()  # on the library
    from sklearn.manifold import TSNE

    neighbours = min(30.0, (len(points) - 1) / 3)
    tsne = TSNE(perplexity=neighbours, init="pca", random_state=seed)
    return torch.from_numpy(tsne.fit_transform(points.numpy()))


def check_projection(method: str) -> None:
    """Raise `SponError` for an unknown projection, or t-SNE without scikit-learn."""
    if method not in PROJECTIONS:
        raise SponError.of("projection", method, "one of " + ", ".join(PROJECTIONS))
    if method == "tsne":
        try:
            import sklearn.manifold  # noqa: F401
        except ImportError as error:
            remedy = "pip install scikit-learn, or use pca."
            raise SponError.of("projection", method, "pca, or scikit-learn installed", remedy) from error
