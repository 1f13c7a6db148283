# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for a GPU that need not be there, as the launchers would launch them.

    python -m tests.kernels.triton.compile_triton 80,90,100 CONFIG.json...|variants|lists|formats [CONFIG.json...]

compiles every launch of files of `spon_plugin/kernels/configs` for matrices, or every kind of argument, or what the
tuner would begin with of lists of codes, or every launch for weights with scales, for compute capabilities, and prints
a JSON line for each compiled kernel: what its loads look like in PTX, registers, stack, shared memory, and how many
loads of weights are in flight (`schedule`). With another Triton than the installed one:

    pip install --no-deps --target DIR triton==3.6.0
    PYTHONPATH=DIR TRITON_CACHE_DIR=DIR/cache pytest tests/kernels/triton/test_triton_compiles.py
"""

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.compile_ahead import compiled_only, empty_weight, kernel_for
from benchmarks.launches import LISTED_RESIDENT, reasoned
from spon_plugin.kernels.triton import common, configs, scaled
from spon_plugin.kernels.triton import compaction as triton_compaction
from spon_plugin.kernels.triton import dense_mask as triton_dense_mask
from spon_plugin.kernels.triton.configs import Launch
from spon_plugin.weights.scaled import ScaledWeight
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
    """Compile all that a launch of `sparse_linear` for a matrix consists of."""
    weight_t = torch.empty(in_features, sum(sizes), dtype=dtype)
    biases = None if bias is None else torch.empty(sum(sizes), dtype=bias)
    yield from _compile(
        KERNELS[launch.kernel].sparse_linear, launch, dtype, rows, weight_t, sizes, per_channel, biases, str(dtype)
    )


def compile_scaled(
    launch: Launch,
    weight: ScaledWeight,
    rows: int,
    sizes: Sequence[int] = (512,),
    per_channel: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[dict[str, object]]:
    """Compile all that a launch for a weight with scales consists of."""
    launch = scaled.within_groups(launch, weight)
    function = kernel_for(weight.format, launch)
    yield from _compile(function, launch, dtype, rows, weight, sizes, per_channel, None, weight.format)


def scaled_weight(format: str, group: int, zeros: bool = False, shape: tuple[int, int] = (4096, 512)) -> ScaledWeight:
    """A weight without values; one scale an output if `group` is 0."""
    weight = empty_weight(format, shape, group, "cpu", zeros)
    assert isinstance(weight, ScaledWeight)
    return weight


def _compile(
    sparse_linear: Callable[..., object],
    launch: Launch,
    dtype: torch.dtype,
    rows: int,
    weight: torch.Tensor | ScaledWeight,
    sizes: Sequence[int],
    per_channel: bool,
    bias: torch.Tensor | None,
    name: str,
) -> Iterator[dict[str, object]]:
    in_features = weight.shape[0] if isinstance(weight, torch.Tensor) else weight.in_features
    with compiled_only() as compiled:
        sparse_linear(
            torch.empty(rows, in_features, dtype=dtype),
            weight,
            torch.empty((len(sizes), in_features) if per_channel else len(sizes)),
            bias,
            shard_sizes=sizes,
            launch=launch,
        )
    for kernel_name, kernel in compiled.items():
        described = {"rows": rows, "dtype": name, "sizes": sizes, "per_channel": per_channel}
        yield {"kernel": kernel_name, **described, "launch": asdict(launch), **report(kernel)}


def shipped(paths: Sequence[Path]) -> Iterator[dict[str, object]]:
    """Every launch of some files, each combination of blocks once, for the plainest arguments and for the richest."""
    done = set()
    for shape in itertools.chain.from_iterable(configs.read(path).shapes for path in paths):
        if shape.dtypes[0] not in configs.DTYPES:
            continue
        dtype = configs.DTYPES[shape.dtypes[0]]
        for most, given in shape.launches.items():
            case = (replace(given, splits=2), dtype, min(most, 5))
            if case not in done:
                done.add(case)
                yield from compile_launch(*case, sizes=(512,))
                yield from compile_launch(*case, sizes=(384, 128, 128), per_channel=True)


def formats(paths: Sequence[Path]) -> Iterator[dict[str, object]]:
    """Every launch of some files for weights with scales: one scale an output, groups with and without zero points."""
    done = set()
    for shape in itertools.chain.from_iterable(configs.read(path).shapes for path in paths):
        for format, (most, given) in itertools.product(shape.dtypes, shape.launches.items()):
            case = (format, min(most, 5), replace(given, splits=2))
            if format not in configs.FORMATS or case in done:
                continue
            done.add(case)
            for group, zeros in (
                ((0, False), (128, False)) if format != "int4" else ((128, False), (64, True), (32, False))
            ):
                weight = scaled_weight(format, group, zeros)
                for line in compile_scaled(case[2], weight, case[1]):
                    yield {**line, "group": group, "zeros": zeros}
            for line in compile_scaled(case[2], weight, case[1], (384, 64, 64), per_channel=True):
                yield {**line, "group": group, "zeros": zeros}


def variants() -> Iterator[dict[str, object]]:
    """Both kernels in every dtype, with one row and several, and with the other kinds of arguments."""
    for kernel, dtype, rows in itertools.product(KERNELS, configs.DTYPES.values(), (1, 5)):
        launch = Launch(kernel, block_in=32, block_out=64, splits=1, num_warps=4, num_stages=2, resident=3)
        yield from compile_launch(launch, dtype, rows, 4095, (33, 1, 64), per_channel=True, bias=None)
        yield from compile_launch(launch, dtype, rows, sizes=(512,), bias=dtype)


def lists() -> Iterator[dict[str, object]]:
    """The compaction kernel for weights with scales: the tuner's first launch whose registers hold what is loaded."""
    for format in configs.FORMATS:
        present = configs.choose("another", format, 4096, 4096, 1)
        assert present is not None
        for launch in reasoned(format, 1, present, 128):
            if launch.kernel == "compaction" and launch.num_stages == 1 and launch.resident == LISTED_RESIDENT[format]:
                for group, zeros in ((128, False), (0, False)) if format != "int4" else ((128, False), (64, True)):
                    yield from compile_scaled(launch, scaled_weight(format, group, zeros), 1)
                yield from compile_scaled(launch, scaled_weight(format, 128), 1, (384, 64, 64), per_channel=True)


if __name__ == "__main__":
    capabilities, *what = sys.argv[1:]
    device = NoDevice()
    triton.runtime.driver.set_active(device)
    common.capability = scaled.capability = lambda _: divmod(device.capability, 10)
    work, *paths = what if what[0] in ("variants", "lists", "formats") else ("shipped", *what)
    for device.capability in map(int, capabilities.split(",")):
        found = {"variants": variants, "lists": lists, "formats": formats, "shipped": shipped}[work]
        for line in found(*([[Path(path) for path in paths]] if work in ("formats", "shipped") else [])):
            print(json.dumps({"capability": device.capability, **line}), flush=True)
