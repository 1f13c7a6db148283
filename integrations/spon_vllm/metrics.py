# SPDX-License-Identifier: Apache-2.0
"""What an operator looks for on ``/metrics``: how often the sparse path runs, and how much it skips.

Layers count in a tensor, so that the replays of a CUDA graph count, too. It lies in the host's memory, where a thread
reads it without a call to the device, once a second, and writes it into a small file in a directory that the worker's
ancestor made: vLLM has no way for a plugin to bring numbers from a worker to the API server. There a collector adds the
files up.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from spon_plugin.masking import keep_mask
from spon_vllm import steps

logger = init_logger("vllm.spon")

DIRECTORY_VARIABLE = "SPON_METRICS_DIR"
_SECONDS_BETWEEN_FILES = 1.0
_SECONDS_BETWEEN_LINES = 60.0
_SAMPLED_LAYERS = 8
_GOLDEN_RATIO = 0.6180339887498949

SPARSE_CALLS, DENSE_CALLS, INPUTS, ZEROED = range(4)
_HELP = {
    "spon:sparse_calls": "Linear layers computed sparsely.",
    "spon:dense_calls": "Linear layers of sparse models computed densely (prompts and large steps of mode decode).",
    "spon:sampled_inputs": "Input entries of sparse layers that were looked at, in a few layers of each worker.",
    "spon:sampled_zeroed": "Input entries among them that the mask zeroed; the ratio is the measured sparsity.",
}


class Counters:
    """The counters of one worker: requests' tokens only, not those of steps that vLLM makes up.

    In a step all layers take the same way, so the first one counts for all. A few, spread over depth and sites, look at
    their inputs.
    """

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._device: Tensor | None = None
        self._layers: dict[int, int] = {}
        self._sampled: set[int] = set()
        self._publishes = False

    def watch(self, thresholds: Sequence[Tensor]) -> None:
        """Count the layers of a model that has been made, instead of those of another before it.

        A layer is known by where its threshold lies: an argument would make each block another graph to compile.

        Args:
            thresholds: of all of the worker's sparse layers, in order. They stay where they are.
        """
        places = [threshold.data_ptr() for threshold in thresholds]
        count = min(_SAMPLED_LAYERS, len(places))
        self._layers = {places[0]: len(places)}
        self._sampled = {places[int(index * _GOLDEN_RATIO % 1 * len(places))] for index in range(count)}
        if self._device is None or self._device.device != thresholds[0].device:
            self._host, self._device = _shared_zeros(len(_HELP), thresholds[0].device)
        if self._host is not None and not self._publishes and os.environ.get(DIRECTORY_VARIABLE):
            self._publishes = True
            threading.Thread(target=self._publish, name="spon-metrics", daemon=True).start()

    def count_sparse(self, x: Tensor, threshold: Tensor) -> None:
        """Count a layer computed sparsely.

        Args:
            x: ``[..., in_features]``, the centre taken off.
            threshold: as in `ops.linear`; the first shard's mask is counted.
        """
        place = threshold.data_ptr()
        self._count_step(x, place, SPARSE_CALLS)
        if place not in self._sampled or self._device is None:
            return
        tokens = steps.real_tokens(x.shape[:-1].numel())
        if tokens is None:
            return
        dropped = ~keep_mask(x, threshold[:1] if threshold.dim() == 1 else threshold[0])
        padding = steps.padding(x.shape[:-1].numel())
        if padding is not None:
            dropped &= ~padding.view(*x.shape[:-1], 1)
        self._device[INPUTS] += tokens * x.shape[-1]
        self._device[ZEROED] += dropped.sum() * (tokens > 0)

    def count_dense(self, x: Tensor, threshold: Tensor) -> None:
        """Count a layer computed densely; the arguments are those of `count_sparse`."""
        self._count_step(x, threshold.data_ptr(), DENSE_CALLS)

    def _count_step(self, x: Tensor, place: int, kind: int) -> None:
        layers = self._layers.get(place)
        if layers is None or self._device is None:
            return
        tokens = steps.real_tokens(x.shape[:-1].numel())
        if tokens is not None:
            self._device[kind] += layers * (tokens > 0)

    def values(self) -> dict[str, int]:
        """Counter name -> value."""
        numbers = [0] * len(_HELP) if self._host is None else self._host.tolist()
        return dict(zip(_HELP, numbers, strict=True))

    def _publish(self) -> None:
        file = Path(os.environ[DIRECTORY_VARIABLE]) / f"{os.getpid()}.json"
        written: dict[str, int] = {}
        logged, last_line = written, time.monotonic()
        while True:
            time.sleep(_SECONDS_BETWEEN_FILES)
            values = self.values()
            if values != written:
                _write(file, values)
                written = values
            if values != logged and time.monotonic() - last_line >= _SECONDS_BETWEEN_LINES:
                logged, last_line = values, time.monotonic()
                share = values["spon:sampled_zeroed"] / max(1, values["spon:sampled_inputs"])
                logger.info(
                    "SPON: %d sparse and %d dense calls so far, measured sparsity %.1f%%",
                    values["spon:sparse_calls"], values["spon:dense_calls"], 100 * share,
                )  # fmt: skip


COUNTERS = Counters()


def _shared_zeros(count: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """int64 ``[count]`` in the host's memory, as the host and as `device` see it; None where they cannot share it."""
    if device.type == "cpu":
        host = torch.zeros(count, dtype=torch.int64, device="cpu")
        return host, host
    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

    try:
        host = torch.zeros(count, dtype=torch.int64, device="cpu", pin_memory=True)
        return host, get_accelerator_view_from_cpu_tensor(host)
    except Exception as error:  # a platform or a driver without unified addresses
        logger.warning("SPON: /metrics has no counters of this worker: %s", error)
        return None, None


class _Collector:
    """Sums the workers' files for prometheus_client."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        total: dict[str, int] = {}
        for file in self.directory.glob("*.json"):
            for name, value in json.loads(file.read_text()).items():
                total[name] = total.get(name, 0) + value
        for name, value in total.items():
            yield CounterMetricFamily(name, _HELP[name], value=value)


_collector: _Collector | None = None


def install() -> None:
    """Answer for this process and those it will start; the first process of a server makes the directory."""
    global _collector
    if _collector is not None:
        return
    from prometheus_client import REGISTRY

    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is None:
        directory = tempfile.mkdtemp(prefix="spon-metrics-")
        os.environ[DIRECTORY_VARIABLE] = directory
        owner = os.getpid()
        atexit.register(lambda: shutil.rmtree(directory, ignore_errors=True) if os.getpid() == owner else None)
    _collector = _Collector(Path(directory))
    REGISTRY.register(_collector)


def _write(file: Path, values: dict[str, int]) -> None:
    temporary = file.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(values))
        temporary.replace(file)
    except OSError:  # the server is shutting down, or the disk is full: counters are not worth a request
        logger.debug("SPON: cannot write %s", file)
