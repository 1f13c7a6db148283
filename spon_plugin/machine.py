# SPDX-License-Identifier: Apache-2.0
"""What the machine multiplies natively, and the dtype to compute in for that.

CPUs without AVX512-BF16 or AMX, as in most laptops, emulate products of bfloat16: torch then runs them at a quarter of
float32's speed. The dtype of the work follows the machine wherever a default stands; what is stored stays what it was.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from spon_plugin.errors import SponError

OVERRIDE = "SPON_NATIVE_DTYPES"
"""An environment variable that takes the place of what torch says: ``bfloat16``, ``bfloat16,float16``, or ``none``."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes of weights and activations that kernels and hosts work in, by the names that users write."""

_HALVES = {name: dtype for name, dtype in DTYPES.items() if dtype != torch.float32}


@functools.lru_cache(maxsize=1)
def native_dtypes() -> frozenset[torch.dtype]:
    """Of bfloat16 and float16, those whose products this CPU does not emulate.

    Raises:
        SponError: `OVERRIDE` names another dtype.
    """
    override = os.environ.get(OVERRIDE)
    if override is not None:
        names = [name.strip() for name in override.split(",") if name.strip() not in ("", "none")]
        for name in names:
            if name not in _HALVES:
                raise SponError.of(OVERRIDE, override, "comma-separated names out of bfloat16 and float16, or none")
        return frozenset(_HALVES[name] for name in names)
    checks: Any = torch.ops.mkldnn
    found = set()
    for dtype, check in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported")):
        # A build without oneDNN has neither operator, and emulates both.
        if hasattr(checks, check) and getattr(checks, check)():
            found.add(dtype)
    return frozenset(found)


def is_native(dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
    """Whether `device` multiplies `dtype` as it is. Of accelerators, and of wider dtypes, that is taken for granted."""
    if dtype not in _HALVES.values() or torch.device(device).type != "cpu":
        return True
    return dtype in native_dtypes()


def compute_dtype(stored: torch.dtype, device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype to compute in with weights that are stored in `stored`: that one where it is native, or float32."""
    return stored if is_native(stored, device) else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """A dtype as users write it: ``float32``."""
    return str(dtype).removeprefix("torch.")


def operations_per_second(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Additions and multiplications per second in products of a decoder's size, timed here; a few tenths of a second.

    The fastest of some: what else runs meanwhile is as likely to be gone in a minute.
    """
    rows, inputs, outputs = 512, 576, 1536
    x = torch.ones(rows, inputs, dtype=dtype, device=device)
    weight = torch.ones(outputs, inputs, dtype=dtype, device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        float(torch.nn.functional.linear(x, weight)[0, 0])  # on an accelerator, waits for the product
        times.append(time.perf_counter() - start)
    return 2 * rows * inputs * outputs / min(times)


def description() -> str:
    """The machine in a few words: its accelerator, or the CPU's cores, torch's threads, and what they multiply."""
    if torch.cuda.is_available():
        return f"GPU, {torch.cuda.get_device_name()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bfloat16 = "native" if is_native(torch.bfloat16) else "emulated"
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    other = "no GPU" if accelerator is None else f"accelerator {accelerator.type}"
    threads = torch.get_num_threads()
    return f"CPU, {_counted(cores, 'core')}, {_counted(threads, 'thread')}, bfloat16 {bfloat16}, {other}"


def device_name(device: torch.device) -> str:
    """What measurements are filed under: a GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{cpu}, {_counted(torch.get_num_threads(), 'thread')}"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
