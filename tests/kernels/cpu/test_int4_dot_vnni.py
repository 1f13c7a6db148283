# SPDX-License-Identifier: Apache-2.0
"""What the sums of four-bit codes by `vpdpbusd` compile to for processors that have it, whichever compiles them."""

import re

import pytest

ir = pytest.importorskip("llvmlite.ir")
int4_dot_vnni = pytest.importorskip("spon_plugin.kernels.cpu.int4_dot_vnni", exc_type=ImportError)
from tests.kernels.cpu.assembly import assembly  # noqa: E402 (needs llvmlite)

# Processor -> features that choose the instruction, bytes in all and in a register, registers' name.
PROCESSORS = {
    "sapphirerapids": ({"avx512vnni"}, 64, 64, "zmm"),
    "znver4": ({"avx512vnni"}, 64, 64, "zmm"),
    "icelake-server": ({"avx512vnni"}, 32, 32, "ymm"),
    "alderlake": ({"avxvnni"}, 64, 32, "ymm"),
}


@pytest.mark.parametrize("cpu", PROCESSORS)
def test_the_inner_loop_is_the_instruction_and_keeps_its_sums_in_registers(cpu, monkeypatch):
    having, width, size, register = PROCESSORS[cpu]
    monkeypatch.setattr(int4_dot_vnni, "features", lambda: having)
    arguments = [ir.IntType(64)] * 7 + [ir.FloatType()]
    lines = assembly(cpu, arguments, int4_dot_vnni._generator(width, size))
    products = [k for k, line in enumerate(lines) if "vpdpbusd" in line]
    assert len(products) == 8 * (width // size)  # of lower codes and of bytes, of four vectors of columns
    assert all(register in lines[k] for k in products)
    labels = [k for k, line in enumerate(lines) if line.startswith(".LBB")]
    begin = max(k for k in labels if k < products[0])
    loop = lines[begin : min(k for k in range(products[7], len(lines)) if re.search(r"\tj\w+\s", lines[k]))]
    assert not any("rsp" in line and register in line for line in loop)
    first = next(k for k, line in enumerate(loop) if "vpunpck" in line)
    loads = [k for k, line in enumerate(loop) if re.search(rf"\tvmov\w+\s+\(.*%{register}", line)]
    in_memory = [k for k, line in enumerate(loop) if re.search(rf"\tvpunpck\w+\s+\(.*%{register}", line)]
    assert len(loads) + len(in_memory) == 4 and all(k < first for k in loads)
    assert sum("prefetcht0" in line for line in loop) == 4
    assert sum("vpunpck" in line for line in loop) == 8
