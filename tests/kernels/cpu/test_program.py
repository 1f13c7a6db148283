# SPDX-License-Identifier: Apache-2.0
"""Stages of a program: one after the other, each on what those before it wrote."""

import pytest
import torch

from spon_plugin.kernels.cpu import block
from spon_plugin.kernels.cpu import block_layout as fields
from spon_plugin.kernels.cpu.kernel import is_available
from spon_plugin.kernels.cpu.program import Program

pytestmark = pytest.mark.skipif(not is_available(), reason="needs Numba and GNU's OpenMP")


def doubling(x):
    """A stage that writes ``2 x``."""
    y = torch.empty_like(x)
    return block.add(x, x, y), y


def test_a_stage_sees_what_the_one_before_it_wrote():
    held, stages = [torch.arange(1000.0)], []
    for _ in range(20):
        stage, y = doubling(held[-1])
        stages.append(stage)
        held.append(y)
    program = Program(stages)
    for _ in range(50):
        for y in held[1:]:
            y.zero_()
        program.run()
        assert torch.equal(held[-1], 2**20 * held[0])


def test_fields_are_set_anew():
    x, other = torch.ones(5), torch.full((5,), 3.0)
    stage, y = doubling(x)
    program = Program([stage])
    program.words[program.place(0, fields.OTHER)] = other.data_ptr()
    program.run()
    assert y.tolist() == [4.0] * 5


def test_programs_join_on_their_own_fields():
    x = torch.ones(5)
    first, y = doubling(x)
    second, z = doubling(y)
    programs = [Program([first]), Program([second])]
    joined, start = Program.joined(programs), torch.full((5,), 10.0)
    for field in (fields.ONE, fields.OTHER):  # after they were joined
        programs[0].words[programs[0].place(0, field)] = start.data_ptr()
    joined.run()
    assert z.tolist() == [40.0] * 5


def test_no_stage():
    Program([]).run()
