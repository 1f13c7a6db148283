# SPDX-License-Identifier: Apache-2.0
"""An adapter's masks on a dense model, run by `attachment`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from spon_plugin.adapter.mask import Mask
from spon_plugin.decoder.attachment import SparseMethod
from spon_plugin.decoder.sparsity import SparsityCounter
from spon_plugin.decoder.tokens import DenseTokens
from spon_plugin.weights import linear_features


class MaskedLinears(SparseMethod):
    """The masks of an adapter, on the model that they are for; the model-wide sparsity is over these linears.

    Attributes:
        alphas: module path -> float32 ``[in_features]``, for `attach`.
    """

    name = "the adapter"

    def __init__(self, masks: Mapping[str, Mask], weights: Mapping[str, int], dense_prefix: int = 0) -> None:
        self.modules, self.weights, self.dense_prefix = tuple(masks), weights, dense_prefix
        self.alphas = {path: mask.alpha.detach() for path, mask in masks.items() if mask.alpha is not None}
        self.centers = {path: mask.center for path, mask in masks.items() if mask.center is not None}
        # An adapter has a mask for every linear. Those beside each other that are equal may be of one input.
        equal: dict[tuple[str, bytes], Mask] = {}
        self.site_of: dict[str, Mask] = {}
        for path, mask in masks.items():
            values = b"".join(t.detach().cpu().numpy().tobytes() for t in mask.without_alpha().tensors().values())
            self.site_of[path] = equal.setdefault((path.rpartition(".")[0], values), mask)

    @classmethod
    def of(cls, model: nn.Module, masks: Mapping[str, Mask], dense_prefix: int = 0) -> MaskedLinears:
        """The masks on their model.

        Args:
            model: the dense model.
            masks: module path -> threshold, centre and alpha.
            dense_prefix: first positions of a sequence that stay dense.

        Raises:
            SponError: a vector has another length than its linear's input.
        """
        moved, weights = {}, {}
        for path, mask in masks.items():
            module = model.get_submodule(path)
            in_features, out_features = linear_features(module, path)
            mask.check_input(path, in_features, "this model")
            moved[path] = mask.to(next(module.parameters()).device)
            weights[path] = in_features * out_features
        return cls(moved, weights, dense_prefix)

    def sparse_input(self, site: Mask, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `SparseMethod.sparse_input`; by `spon_plugin.masking`."""
        return site.to(x.device).sparse_deviation(x)


@contextmanager
def sparse_inputs(
    model: nn.Module, masks: Mapping[str, Mask], dense_prefix: int = 0, counter: SparsityCounter | None = None
) -> Iterator[DenseTokens]:
    """While the block runs, every linear in `masks` computes ``W S(x) + b + W alpha``.

    Tokens in the dense prefix compute ``W x + b``, as in the dense model. What does not depend on the input,
    ``W (center + alpha)``, is folded once, at the start.

    Args:
        model: a dense model.
        masks: module path -> threshold, centre and alpha.
        dense_prefix: the first positions of each sequence that stay dense.
        counter: counts what the masks drop.

    Yields:
        The rule of which tokens are dense; see `SparseMethod.attach`.

    Raises:
        SponError: a vector has another length than its linear's input.
    """
    method = MaskedLinears.of(model, masks, dense_prefix)
    with method.attach(model, method.alphas, counter) as tokens:
        yield tokens
