# SPDX-License-Identifier: Apache-2.0
"""Calls that `torch.compile` does not look into; apart from the rest, because importing this module imports Dynamo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, between two graphs."""
    return function(*args, **kwargs)
