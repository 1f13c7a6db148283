# SPDX-License-Identifier: Apache-2.0
"""What the processor has that Numba compiles for, and the sums of four-bit codes that suit it."""

from __future__ import annotations

from functools import cache

from llvmlite import binding
from numba.core import config
from numba.core.codegen import get_host_cpu_features

from spon_plugin.kernels.cpu.scaled_layout import (
    SUM_INT4_AVX2,
    SUM_INT4_AVX512_VNNI,
    SUM_INT4_AVX_VNNI,
    SUM_INT4_PORTABLE,
)

# Of LLVM's names: bytes are interleaved by AVX512BW, and the last vector of a row is half as wide (AVX512VL).
_NEEDS = {
    SUM_INT4_AVX512_VNNI: {"avx512vnni", "avx512bw", "avx512vl"},
    SUM_INT4_AVX_VNNI: {"avxvnni", "avx2"},
    SUM_INT4_AVX2: {"avx2"},
}


@cache
def features() -> frozenset[str]:
    """Instruction sets of x86-64 by LLVM's names, as NUMBA_CPU_FEATURES has them, or else the processor."""
    if not binding.get_process_triple().startswith("x86_64"):
        return frozenset()
    given = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return frozenset(name[1:] for name in given.split(",") if name.startswith("+"))


def int4_sums() -> str:
    """The fastest way to sum four-bit codes in integers here, of `scaled_layout.INTEGERS`."""
    return next((kind for kind, needs in _NEEDS.items() if needs <= features()), SUM_INT4_PORTABLE)


def runs(kind: str) -> bool:
    """Whether int4 is summed as `kind` here: `int4_dot` has no other way than its instruction."""
    return kind != SUM_INT4_AVX2 or _NEEDS[kind] <= features()
