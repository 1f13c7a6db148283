# SPDX-License-Identifier: Apache-2.0
"""Whether a model still has the modules and tensors that something was made of.

What was made of a layer's tensors knows their addresses, so it has to look before each call whether they were replaced,
moved or written to. A small model's token has some seven hundred of them: the loops here are Python's own, in C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

Place = tuple[Mapping[str, Any], str]
"""A dictionary, such as a module's `_buffers`, and a name in it."""

_version, _is_trained = attrgetter("_version"), attrgetter("requires_grad")


class Watched:
    """What lies at some places, and whether the very same lies there now.

    Attributes:
        found: at the places, in their order; None where nothing was.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places, self._names = [place for place, _ in places], [name for _, name in places]
        self.found = [place.get(name) for place, name in places]

    def are_same(self) -> bool:
        """Whether each place holds the object that was found there."""
        return all(map(is_, map(dict.get, self._places, self._names), self.found))  # type: ignore[arg-type]


class WatchedTensors(Watched):
    """Tensors or None, and whether they are where and what they were.

    Of tensors that were made in inference mode, or are of a class of their own, nobody can tell: they are the same as
    long as they are there. Neither does torch count what is written to a tensor's `data`.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        super().__init__(places)
        self._tensors: list[Any] = [tensor for tensor in self.found if _is_counted(tensor)]
        self._matrices = [tensor for tensor in self._tensors if tensor.dim() > 1]
        self._state = self._now()

    @property
    def are_trained(self) -> bool:
        """Whether one of them asks for a gradient now."""
        return any(map(_is_trained, self._tensors))

    def are_same(self) -> bool:
        """Whether each place holds its tensor, which lies as it did and was not written to."""
        return super().are_same() and self._now() == self._state

    def _now(self) -> list[list[Any]]:
        tensors = self._tensors
        looks: tuple[tuple[Any, list[Tensor]], ...] = (
            (Tensor.data_ptr, tensors), (Tensor.stride, self._matrices), (_version, tensors),
        )  # fmt: skip
        return [[*map(look, at)] for look, at in looks]


def _is_counted(tensor: Any) -> bool:
    """Whether torch counts the writes to a tensor; None is none."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()
