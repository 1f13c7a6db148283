# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for a GPU that need not be there, as the launchers would launch them.

    python -m tests.kernels.triton.compile_triton 80,90,100 CONFIG.json...|variants

compiles every launch of files of `spon_plugin/kernels/configs`, or every kind of argument, for compute capabilities,
and prints a JSON line for each compiled kernel: what its loads look like in PTX, registers, stack,
shared memory, and how many loads of weights are in flight (`schedule`). With another Triton than the installed one:

    pip install --no-deps --target DIR triton==3.6.0
    PYTHONPATH=DIR TRITON_CACHE_DIR=DIR/cache pytest tests/kernels/triton/test_triton_compiles.py
"""

import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from spon_plugin.kernels.triton import common, configs
from spon_plugin.kernels.triton import compaction as triton_compaction
from spon_plugin.kernels.triton import dense_mask as triton_dense_mask
from spon_plugin.kernels.triton.configs import Launch
from tests.kernels.triton.schedule import resources, schedule, waits_first

KERNELS = {"dense_mask": triton_dense_mask, "compaction": triton_compaction}


class NoDevice:
    """Stands in for Triton's driver: names the GPU to compile for, and has none."""

    capability = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton asks for the target of each device once

    def get_current_stream(self, device: int) -> int:
        return 0


def report(kernel: triton.compiler.CompiledKernel) -> dict[str, object]:
    """What the weights' loads look like, and what the kernel occupies."""
    ptx = kernel.asm["ptx"]
    # The only loads told to leave the cache first are those of weights; a copy's last operand is the bytes it reads.
    plain = re.findall(r"(@%p\d+ )?ld\.global\.L1::evict_first\S*?((?:\.v\d)?\.b\d+) ", ptx)
    copies = re.findall(r"(@%p\d+ )?cp\.async\.cg\.shared\.global\S* \[[^]]*\], \[[^]]*\], (0x10|16), (%r\d+)?", ptx)
    found = schedule(kernel.asm["cubin"])
    return {
        **(found._asdict() if found else {}),
        "weight_loads": sorted({width for _, width in plain}),
        "weight_loads_predicated": all(predicate for predicate, _ in plain),
        "copies": len(copies),
        "copies_predicated": all(predicate or size for predicate, _, size in copies),
        "tensor_cores": bool(re.search(r"mma\.sync|wgmma", ptx)),
        "shared": kernel.metadata.shared,
        "starts_early": "griddepcontrol.wait" in ptx,
        "waits_first": waits_first(kernel.asm["cubin"]),
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
        described = {"rows": rows, "dtype": str(dtype), "sizes": sizes, "per_channel": per_channel}
        yield {"kernel": name, **described, "launch": asdict(launch), **report(kernel)}


def shipped(paths: Sequence[Path]) -> Iterator[dict[str, object]]:
    """Every launch of some files, each combination of blocks once, for the plainest arguments and for the richest."""
    done = set()
    for shape in itertools.chain.from_iterable(configs.read(path).shapes for path in paths):
        dtype = configs.DTYPES[shape.dtypes[0]]
        for most, given in shape.launches.items():
            case = (replace(given, splits=2), dtype, min(most, 5))
            if case not in done:
                done.add(case)
                yield from compile_launch(*case, sizes=(512,))
                yield from compile_launch(*case, sizes=(384, 128, 128), per_channel=True)


def variants() -> Iterator[dict[str, object]]:
    """Both kernels in every dtype, with one row and several, and with the other kinds of arguments."""
    for kernel, dtype, rows in itertools.product(KERNELS, configs.DTYPES.values(), (1, 5)):
        launch = Launch(kernel, block_in=32, block_out=64, splits=1, num_warps=4, num_stages=2, resident=3)
        yield from compile_launch(launch, dtype, rows, 4095, (33, 1, 64), per_channel=True, bias=None)
        yield from compile_launch(launch, dtype, rows, sizes=(512,), bias=dtype)


if __name__ == "__main__":
    capabilities, *what = sys.argv[1:]
    device = NoDevice()
    triton.runtime.driver.set_active(device)
    common.starts_early = lambda _: device.capability >= 90
    for device.capability in map(int, capabilities.split(",")):
        for line in variants() if what == ["variants"] else shipped([Path(path) for path in what]):
            print(json.dumps({"capability": device.capability, **line}), flush=True)
