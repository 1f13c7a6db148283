# SPDX-License-Identifier: Apache-2.0
"""The sparse form of a tensor that several linears read, made once for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


class SparseInput:
    """The sparse form of one tensor at one site."""

    def __init__(self, kept: Tensor, mask: Tensor | None) -> None:
        self.kept, self.mask = kept, mask
        self._dropped: Tensor | None = None

    def dropped(self) -> Tensor | None:
        """How many entries of each token the mask drops, ``[...]``; None without a mask."""
        if self._dropped is None and self.mask is not None:
            self._dropped = self.mask.shape[-1] - self.mask.sum(-1)
        return self._dropped


class _LastInput:
    """The tensor that a linear has read last, and its sparse forms."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.version = x, _version(x)
        self.forms: dict[Any, tuple[SparseInput, int]] = {}


class SharedInput:
    """The sparse form of an input, made when the first linear of a site asks and shared with the others.

    What is remembered is taken up for the very tensor that it was made of, and only if that has not been written to; so
    it does not matter which linears read one tensor, nor how many threads run the model. A form is let go when all
    linears of its site have had it.

    Args:
        sparse_input: makes the form of a tensor for a site, and the mask; see `attachment.SparseMethod`.
        site_of: module path -> its site.
    """

    def __init__(
        self, sparse_input: Callable[[Any, Tensor], tuple[Tensor, Tensor | None]], site_of: Mapping[str, Any]
    ) -> None:
        self.sparse_input, self.site_of = sparse_input, site_of
        self.readers = Counter(site_of.values())
        self._last: _LastInput | None = None

    def __call__(self, path: str, x: Tensor) -> SparseInput:
        """The sparse form of what the linear at `path` reads."""
        site = self.site_of[path]
        if self.readers[site] == 1:
            return SparseInput(*self.sparse_input(site, x))
        last = self._last
        if last is None or last.x is not x or last.version != _version(x):
            last = self._last = _LastInput(x)
        form, asked = last.forms.get(site) or (SparseInput(*self.sparse_input(site, x)), 0)
        if asked + 1 == self.readers[site]:
            last.forms.pop(site, None)
            if not last.forms and self._last is last:
                self._last = None
        else:
            last.forms[site] = (form, asked + 1)
        return form


def _version(x: Tensor) -> int:
    """Counts writes to a tensor; those to an inference tensor are not counted."""
    return 0 if x.is_inference() else x._version
