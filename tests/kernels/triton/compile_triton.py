# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for a GPU that need not be there, as the launchers would launch them.

    python -m tests.kernels.triton.compile_triton CONFIG.json|variants

compiles every launch of a file of `spon_plugin/kernels/configs`, or every kind of argument, for compute capability 9.0,
and prints a JSON line for each compiled kernel: what its loads look like in PTX, registers, stack, shared memory.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from spon_plugin.kernels.triton import compaction as triton_compaction
from spon_plugin.kernels.triton import configs
from spon_plugin.kernels.triton import dense_mask as triton_dense_mask
from spon_plugin.kernels.triton.configs import Launch

KERNELS = {"dense_mask": triton_dense_mask, "compaction": triton_compaction}


class NoDevice:
    """Stands in for Triton's driver: names the GPU to compile for, and has none."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of stack, which is where registers spill to."""
    reader = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([reader, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", said.stdout)[0]
    return {"registers": int(registers), "stack": int(stack)}


def report(kernel: triton.compiler.CompiledKernel) -> dict[str, object]:
    """What the weights' loads look like, and what the kernel occupies."""
    ptx = kernel.asm["ptx"]
    # The only loads told to leave the cache first are those of weights; a copy's last operand is the bytes it reads.
    plain = re.findall(r"(@%p\d+ )?ld\.global\.L1::evict_first\S*?((?:\.v\d)?\.b\d+) ", ptx)
    copies = re.findall(r"(@%p\d+ )?cp\.async\.cg\.shared\.global\S* \[[^]]*\], \[[^]]*\], (0x10|16), (%r\d+)?", ptx)
    return {
        "weight_loads": sorted({width for _, width in plain}),
        "weight_loads_predicated": all(predicate for predicate, _ in plain),
        "copies": len(copies),
        "copies_predicated": all(predicate or size for predicate, _, size in copies),
        "tensor_cores": bool(re.search(r"mma\.sync|wgmma", ptx)),
        "shared": kernel.metadata.shared,
        **resources(kernel.asm["cubin"]),
    }


def compile_launch(
    launch: Launch,
    dtype: torch.dtype,
    rows: int,
    in_features: int = 4096,
    sizes: Sequence[int] = (496, 16),
    per_channel: bool = False,
    bias: torch.dtype | None = torch.float32,
) -> Iterator[dict[str, object]]:
    """Compile all that a launch of `sparse_linear` consists of."""
    compiled = {}

    def compile_only(function: JITFunction, *args: object, warmup: bool, **options: object) -> None:
        compiled[function.__name__] = run(function, *args, warmup=True, **options)

    run, JITFunction.run = JITFunction.run, compile_only
    try:
        KERNELS[launch.kernel].sparse_linear(
            torch.empty(rows, in_features, dtype=dtype),
            torch.empty(in_features, sum(sizes), dtype=dtype),
            torch.empty((len(sizes), in_features) if per_channel else len(sizes)),
            None if bias is None else torch.empty(sum(sizes), dtype=bias),
            shard_sizes=sizes,
            launch=launch,
        )
    finally:
        JITFunction.run = run
    for name, kernel in compiled.items():
        yield {"kernel": name, "rows": rows, "dtype": str(dtype), "launch": str(launch), **report(kernel)}


def shipped(path: Path) -> Iterator[dict[str, object]]:
    """Both kernels at every launch of a file, each combination of blocks once."""
    done = set()
    for shape in configs.read(path).shapes:
        dtype = configs.DTYPES[shape.dtypes[0]]
        for most, given in shape.launches.items():
            for kernel in KERNELS:
                case = (replace(given, kernel=kernel, splits=min(given.splits, 2)), dtype, min(most, 5))
                if case not in done:
                    done.add(case)
                    yield from compile_launch(*case)


def variants() -> Iterator[dict[str, object]]:
    """Both kernels in every dtype, with one row and several, and with the other kinds of arguments."""
    for kernel, dtype, rows in itertools.product(KERNELS, configs.DTYPES.values(), (1, 5)):
        launch = Launch(kernel, block_in=32, block_out=64, splits=1, num_warps=4, num_stages=2)
        yield from compile_launch(launch, dtype, rows, 4095, (33, 1, 64), per_channel=True, bias=None)
        yield from compile_launch(launch, dtype, rows, sizes=(512,), bias=dtype)


if __name__ == "__main__":
    triton.runtime.driver.set_active(NoDevice())
    for line in variants() if sys.argv[1] == "variants" else shipped(Path(sys.argv[1])):
        print(json.dumps(line), flush=True)
