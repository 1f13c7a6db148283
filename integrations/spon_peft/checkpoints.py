# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a training run: which plan they belong to, and which of them are whole."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

from transformers import TrainerState

from spon_plugin import read_adapter
from spon_plugin.errors import SponError

_STATES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")


def check_plan(work: Path, plan: dict[str, Any]) -> None:
    """Keep the plan of a training run beside its checkpoints, so that they are not taken up by another one.

    Args:
        work: the directory of the checkpoints; made if it is not there.
        plan: JSON values.

    Raises:
        SponError: the checkpoints in `work` are of another plan, or the plan cannot be read.
    """
    file = work / "plan.json"
    remedy = "Repeat the interrupted command, or remove the directory to start anew."
    if file.is_file():
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SponError.of(str(file), str(error), "valid JSON", "Remove the directory to start anew.") from error
        for name, value in plan.items():
            if kept.get(name) != value:
                raise SponError.of(name, value, f"{kept.get(name)!r}, as in the checkpoints in {work}", remedy)
    work.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(".tmp")
    written.write_text(json.dumps(plan, indent=2), encoding="utf-8")
    written.replace(file)


def newest_whole(work: Path) -> str | None:
    """The newest checkpoint of `transformers.Trainer` in `work` that can be read; None for none.

    A run that was stopped while it saved leaves one that cannot.
    """
    found = [
        (int(match[1]), each) for each in work.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", each.name))
    ]
    return next((str(directory) for _, directory in sorted(found, reverse=True) if _is_whole(directory)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_adapter(checkpoint)
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        for pattern in _STATES:
            files = list(checkpoint.glob(pattern))
            if not files or any(zipfile.ZipFile(file).testzip() is not None for file in files):
                return False
    except (OSError, ValueError, TypeError, zipfile.BadZipFile):  # SponError among them
        return False
    return True
