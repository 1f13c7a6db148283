# SPDX-License-Identifier: Apache-2.0
"""Tables as text: Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]], text: int = 1) -> list[str]:
    """Lines of a Markdown table whose first `text` columns are text and the others figures."""
    rule = "|" + " --- |" * text + " ---: |" * (len(head) - text)
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in body)]


def csv_text(flat: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV; empty without any."""
    out = io.StringIO()
    if flat:
        writer = csv.DictWriter(out, fieldnames=list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    return out.getvalue()


def json_text(value: Any) -> str:
    """A value as JSON with a newline at its end; numbers that JSON does not have (NaN, infinity) become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> str:
    """A perplexity; None where it is not finite."""
    return "diverged" if value is None else f"{value:.2f}" if value < 1e5 else f"{value:.2g}"
