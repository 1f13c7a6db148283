# SPDX-License-Identifier: Apache-2.0
"""Thread functions that run one after the other in a single call.

A call from Python costs some tens of microseconds with all that surrounds it, as long as a narrow product takes. What a
model does between two places where Python has to look therefore runs as one program, by the same threads, which wait
for each other after every stage.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from spon_plugin.kernels.cpu import kernel as cpu
from spon_plugin.kernels.cpu.kernel import Stage
from spon_plugin.kernels.cpu.layout import HEAD


@functools.lru_cache(maxsize=1)
def _runner() -> tuple[Any, int]:
    from spon_plugin.kernels.cpu.program_worker import compile_runner

    compiled = compile_runner()
    return compiled, compiled.address


class Program:
    """Stages with fields that may be set anew before each run.

    Args:
        stages: in their order.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        begin, starts = HEAD + 2 * len(stages), []
        for stage in stages:
            starts.append(begin)
            begin += len(stage.words) // 8
        # The number of stages and their barrier; for each its function and where its fields are; and all fields.
        self.words = np.zeros(begin, dtype=np.int64)
        self._address, self._starts = self.words.ctypes.data, starts
        self._parts: tuple[Program, ...] = ()  # whose fields it runs on
        self.words[:HEAD] = len(stages), cpu.barrier_of_programs()
        for number, (stage, start) in enumerate(zip(stages, starts, strict=True)):
            self.words[HEAD + 2 * number : HEAD + 2 + 2 * number] = stage.function, self._address + 8 * start
            self.words[start : start + len(stage.words) // 8] = np.frombuffer(stage.words, np.int64)

    @classmethod
    def joined(cls, programs: Sequence[Program]) -> Program:
        """The stages of several programs, one after the other, on their fields."""
        together, stages = cls([]), sum(int(program.words[0]) for program in programs)
        tables = [program.words[HEAD : HEAD + 2 * int(program.words[0])] for program in programs]
        together.words = np.concatenate([together.words, *tables])
        together.words[0], together._address = stages, together.words.ctypes.data
        together._parts = tuple(programs)
        return together

    def place(self, stage: int, field: int) -> int:
        """Where `words` has a field of a stage."""
        return self._starts[stage] + field

    def run(self) -> None:
        """Run the stages, on torch's threads."""
        cpu.parallel()(_runner()[1], self._address, torch.get_num_threads(), 0)
