# SPDX-License-Identifier: Apache-2.0
"""What the decoder of compiled schedules reads, on listings written by hand."""

import pytest

pytest.importorskip("triton", reason="the decoder uses the disassembler that Triton ships")
from tests.kernels.triton.schedule import Schedule, read

LOAD = "@P0 LDG.E.EF.128 R4, desc[UR6][R12.64]"
OTHER = "LDG.E.EL.U16 R13, desc[UR4][R4.64]"
USE = "FFMA R4, R61, R68, R41"
COPY = "LDGSTS.E.BYPASS.128.ZFILL [R3], desc[UR6][R12.64], P0"
END = "LDGDEPBAR"
BACK = "@P0 BRA `(.L_x_1)"
NONE = 7


def listing(*instructions: tuple[str, int, tuple[int, ...]]) -> str:
    """A loop as `nvdisasm -hex` lists it, from texts, the scoreboards that they set, and those that they wait for."""
    lines = [".L_x_1:"]
    for place, (text, sets, waits) in enumerate(instructions):
        high = (sum(1 << board for board in waits) << 11 | sets << 5) << 41
        lines.append(f"        /*{place * 16:04x}*/                   {text} ;   /* 0x0000000c040c7981 */")
        lines.append(f"                                                        /* {high:#018x} */")
    return "\n".join(lines)


def test_loads_in_a_row_are_in_flight_together() -> None:
    body = [(LOAD, 2, ())] * 4 + [(LOAD, 3, ())] * 4 + [(USE, NONE, (2, 3)), (BACK, NONE, ())]
    assert read(listing(*body)) == Schedule(10, 8, 0)


def test_a_load_next_to_its_use_is_alone() -> None:
    body = [(LOAD, 2, ()), (USE, NONE, (2,))] * 8 + [(BACK, NONE, ())]
    assert read(listing(*body)) == Schedule(17, 1, 0)


def test_a_scoreboard_that_is_waited_for_releases_its_own_loads_only() -> None:
    body = [(LOAD, 2, ()), (LOAD, 3, ()), (USE, NONE, (2,)), (LOAD, 2, ()), (LOAD, 2, ()), (USE, NONE, (2, 3))]
    assert read(listing(*body, (BACK, NONE, ()))) == Schedule(7, 3, 0)


def test_what_one_turn_loads_for_the_next_counts() -> None:
    body = [(LOAD, 2, ()), (LOAD, 2, ()), (USE, NONE, (3,)), (LOAD, 3, ()), (LOAD, 3, ()), (USE, NONE, (2,))]
    assert read(listing(*body, (BACK, NONE, ()))) == Schedule(7, 4, 0)


def test_loads_of_other_things_do_not_count() -> None:
    assert read(listing((OTHER, 2, ()), (LOAD, 2, ()), (USE, NONE, (2,)), (BACK, NONE, ()))) == Schedule(4, 1, 0)
    assert read(listing((OTHER, 2, ()), (USE, NONE, (2,)), (BACK, NONE, ()))) is None
    assert read(listing((LOAD, 2, ()), (USE, NONE, (2,)))) is None, "no loop"


@pytest.mark.parametrize(("left", "stages"), [(0, 1), (2, 2), (4, 3)])
def test_tiles_that_are_copied_ahead(left: int, stages: int) -> None:
    """Each turn starts two groups of copies: of x, and of weights."""
    wait = f"DEPBAR.LE SB0, {left:#x}"
    body = [(wait, NONE, ()), (USE, NONE, ()), (COPY, NONE, ()), (END, NONE, ()), (COPY, NONE, ()), (END, NONE, ())]
    assert read(listing(*body, (BACK, NONE, ()))) == Schedule(7, 0, stages)
