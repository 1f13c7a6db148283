# SPDX-License-Identifier: Apache-2.0
"""Cold-cache timing: every call works on another copy of its data, so that weights come from memory, not from a cache.

The method is flashinfer's (`flashinfer/testing/utils.py`): rotate over enough copies to exceed the cache several times,
take the median. On CUDA one graph holds a run over all copies, so that launches cost what they cost in a served model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

CACHE_MULTIPLE = 5
ENOUGH = 1 << 30  # bytes of all copies, if that is twice the cache


def cache_bytes(device: torch.device) -> int:
    """The size of the last cache before memory: L2 of a GPU; of a CPU 64 MB, or more where Linux says so."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20))
    told = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    size = told.read_text().strip() if told.exists() else ""
    return max(64 << 20, int(size[:-1]) << 10 if size.endswith("K") else 0)


def copies_for(nbytes: int, device: torch.device) -> int:
    """How many copies of `nbytes` exceed the cache of `device` `CACHE_MULTIPLE` times, or are `ENOUGH`; at least 3."""
    cache = cache_bytes(device)
    return max(3, -(-min(CACHE_MULTIPLE * cache, max(ENOUGH, 2 * cache)) // nbytes))


def median_seconds(
    call: Callable[[int], object], copies: int, device: torch.device | str, seconds: float = 1.0
) -> float:
    """The median time of ``call(i)``, ``i`` rotating over ``range(copies)``.

    Args:
        call: runs the work once, on buffer set `i`; must be capturable in a CUDA graph on a GPU.
        copies: number of buffer sets; see `copies_for`.
        device: where the work runs.
        seconds: how long to measure.
    """
    return interleaved_medians({"it": call}, copies, device, seconds)["it"]


def interleaved_medians(
    calls: Mapping[str, Callable[[int], object]], copies: int, device: torch.device | str, seconds: float = 1.0
) -> dict[str, float]:
    """The median time of each of several calls, measured in turns so that all of them see the same machine.

    Args:
        calls: by name, what `median_seconds` takes.
        copies: number of buffer sets.
        device: where the work runs.
        seconds: how long to measure, for all of them together.

    Returns:
        Seconds per call, by name.
    """
    device = torch.device(device)
    timed = _cuda_rounds if device.type == "cuda" else _cpu_rounds
    return {name: statistics.median(times) for name, times in timed(calls, copies, seconds).items()}


def _cpu_rounds(calls: Mapping[str, Callable[[int], object]], copies: int, seconds: float) -> dict[str, list[float]]:
    # With one thread, the time that it ran: what else shares the machine then counts by what it does to caches alone.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for i in range(copies):  # the first call on a weight is checked, which costs more than reading a small one
        for call in calls.values():
            call(i)
        if i > 1 and time.perf_counter() > end:
            break
    turn, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end or turn < 5:
        for offset, (name, call) in enumerate(calls.items()):
            # Another copy for each name: nobody may profit from what the one before has just read.
            i = (turn * len(calls) + offset) % copies
            start = clock()
            call(i)
            times[name].append(clock() - start)
        turn += 1
    return times


def _cuda_rounds(calls: Mapping[str, Callable[[int], object]], copies: int, seconds: float) -> dict[str, list[float]]:
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, call in calls.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(copies):
                call(i)
        torch.cuda.current_stream().wait_stream(side)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for i in range(copies):
                call(i)
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 5:
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) / 1e3 / copies)
        turn += 1
    return times
