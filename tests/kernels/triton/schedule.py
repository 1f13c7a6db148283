# SPDX-License-Identifier: Apache-2.0
"""The schedule that a kernel was compiled to: how many of its loads of weights are under way at once.

The number of loads in PTX says nothing of that: ptxas may put each next to its use. The machine code does, because
every instruction names the scoreboards that it waits for and the one that its own result will be reported to.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SCOREBOARDS = range(6)
# Only weights are told to leave the cache first.
WEIGHT_LOAD = re.compile(r"LDG\S*\.EF\.\S*128|LDG\S*\.128\S*\.EF")
# One line of `nvdisasm -hex`, and the second half of the 128 bits of an instruction, on the next.
ENCODED = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?P<text>.*?)\s*;?\s+/\* 0x[0-9a-f]{16} \*/\n\s*/\* (?P<high>0x[0-9a-f]{16}) \*/"
)
LABEL = re.compile(r"^(?P<label>\.L\w+):", re.MULTILINE)


class Instruction(NamedTuple):
    """A machine instruction.

    Attributes:
        text: as disassembled.
        sets: the scoreboard that is released when its result is there; 7 for none.
        waits: a bit for each scoreboard that must be free before it starts.
    """

    text: str
    sets: int
    waits: int


class Schedule(NamedTuple):
    """The loop over the weights.

    Attributes:
        instructions: how many it has.
        loads_in_flight: the most loads of weights, sixteen bytes each, that a thread has under way at once.
        stages_in_flight: the most tiles that asynchronous copies have under way at once; 0 without such copies.
    """

    instructions: int
    loads_in_flight: int
    stages_in_flight: int


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of stack, which is where registers spill to."""
    said = _run(cubin, "cuobjdump", "--dump-resource-usage")
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", said)[0]
    return {"registers": int(registers), "stack": int(stack)}


def schedule(cubin: bytes) -> Schedule | None:
    """The schedule of the loop that loads weights; None for a kernel that has none."""
    return read(_run(cubin, "nvdisasm", "-hex", "-c"))


def read(disassembly: str) -> Schedule | None:
    """`schedule`, from what `nvdisasm` says."""
    for body in _loops(disassembly):
        copies = any("LDGSTS" in instruction.text for instruction in body)
        if copies or any(WEIGHT_LOAD.search(instruction.text) for instruction in body):
            return Schedule(len(body), _loads_in_flight(body), _stages_in_flight(body) if copies else 0)
    return None


def waits_first(cubin: bytes) -> bool:
    """Whether a kernel that may start before the one it depends on ends waits for that before it loads anything."""
    texts = [match["text"] for match in ENCODED.finditer(_run(cubin, "nvdisasm", "-hex", "-c"))]
    wait, load = (
        next((place for place, text in enumerate(texts) if name in text), None) for name in ("ACQBULK", "LDG")
    )
    return wait is not None and load is not None and wait < load


def _run(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [next(TOOLS.glob(f"{tool}*")), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _loops(disassembly: str) -> Iterator[list[Instruction]]:
    """The bodies of a kernel's loops, in order: what lies between a label and a jump back to it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    found = [*LABEL.finditer(disassembly), *ENCODED.finditer(disassembly)]
    for match in sorted(found, key=lambda match: match.start()):
        if "label" in match.groupdict():
            labels[match["label"]] = len(instructions)
            continue
        control = int(match["high"], 16) >> 41
        instructions.append(Instruction(match["text"], control >> 5 & 7, control >> 11 & 63))
        target = re.search(r"\bBRA\b.*`\((?P<label>\S+)\)", match["text"])
        if target and target["label"] in labels:
            yield instructions[labels[target["label"]] :]


def _loads_in_flight(body: list[Instruction]) -> int:
    """Walk over the loop twice, because what one turn loads another may wait for."""
    open_loads: Counter[int] = Counter()
    most = 0
    for instruction in body * 2:
        for scoreboard in SCOREBOARDS:
            if instruction.waits >> scoreboard & 1:
                open_loads[scoreboard] = 0
        if WEIGHT_LOAD.search(instruction.text) and instruction.sets in SCOREBOARDS:
            open_loads[instruction.sets] += 1
            most = max(most, open_loads.total())
    return most


def _stages_in_flight(body: list[Instruction]) -> int:
    """A turn of the loop waits until only so many groups of copies are left, and starts its own."""
    groups = sum("LDGDEPBAR" in instruction.text for instruction in body)
    left = [re.search(r"DEPBAR\.LE SB0, (0x\w+)", instruction.text) for instruction in body]
    return min(int(match[1], 16) for match in left if match) // groups + 1
