# SPDX-License-Identifier: Apache-2.0
"""The one error type of the package: it names the field, what was received, what was expected and the remedy."""

from __future__ import annotations

from typing import Any


class SponError(ValueError):
    """Wrong input, said before any work starts.

    Subclasses `ValueError`, so that hosts which catch bad arguments catch ours too.
    """

    @classmethod
    def of(cls, field: str, received: Any, expected: str, remedy: str = "") -> SponError:
        """Build a message of the form ``field: got X, expected Y. Remedy``.

        Args:
            field: the argument, config key, tensor or file that is wrong.
            received: the value as it came; shown with ``repr`` (shortened).
            expected: what would have been accepted.
            remedy: what to do about it; empty where `expected` says it all.
        """
        shown = repr(received)
        if len(shown) > 200:
            shown = shown[:197] + "..."
        message = f"{field}: got {shown}, expected {expected}."
        return cls(f"{message} {remedy}" if remedy else message)
