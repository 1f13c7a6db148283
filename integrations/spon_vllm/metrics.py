# SPDX-License-Identifier: Apache-2.0
"""What an operator looks for on ``/metrics``: how often the sparse path runs, and how much it skips.

Workers count; the API server answers. vLLM has no way for a plugin to bring numbers from the one to the other, so each
worker writes its counters into a small file once in a second, in a directory that its ancestor made, and a collector
in the API server adds the files up.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from spon_plugin.masking import keep_mask

logger = init_logger("vllm.spon")

DIRECTORY_VARIABLE = "SPON_METRICS_DIR"
_SECONDS_BETWEEN_FILES = 1.0
_SECONDS_BETWEEN_LINES = 60.0
_SAMPLE_EVERY = 61  # a prime, so that the samples walk through the layers

_HELP = {
    "spon:sparse_calls": "Linear layers computed sparsely.",
    "spon:dense_calls": "Linear layers of sparse models computed densely (steps above the limit of mode decode).",
    "spon:sampled_inputs": "Input entries of sparse calls that were looked at.",
    "spon:sampled_zeroed": "Input entries among them that the mask zeroed; the ratio is the measured sparsity.",
}


class Counters:
    """The counters of one worker.

    Where CUDA graphs replay, Python does not run and nothing is counted: there they count captures and eager steps.

    Attributes:
        sparse_calls: linear layers computed sparsely.
        dense_calls: linear layers computed densely.
    """

    def __init__(self) -> None:
        self.sparse_calls = 0
        self.dense_calls = 0
        self._inputs = 0
        self._zeroed: Tensor | int = 0
        self._written = self._logged = time.monotonic()

    def count_sparse(self, x: Tensor, threshold: Tensor) -> None:
        """Count one sparse call, and look into one of many.

        Args:
            x: ``[..., in_features]``, the centre taken off.
            threshold: as in `ops.linear`; the first shard's mask is counted.
        """
        self.sparse_calls += 1
        if self.sparse_calls % _SAMPLE_EVERY == 0 and not _capturing(x):
            zeroed = x.numel() - keep_mask(x, threshold[:1] if threshold.dim() == 1 else threshold[0]).sum()
            self._zeroed, self._inputs = zeroed + self._zeroed, self._inputs + x.numel()
            self._publish()

    def values(self) -> dict[str, int]:
        """Counter name -> value; waits for the device."""
        return {
            "spon:sparse_calls": self.sparse_calls,
            "spon:dense_calls": self.dense_calls,
            "spon:sampled_inputs": self._inputs,
            "spon:sampled_zeroed": int(self._zeroed),
        }

    def _publish(self) -> None:
        now = time.monotonic()
        if now - self._written < _SECONDS_BETWEEN_FILES:
            return
        self._written = now
        values = self.values()
        if now - self._logged >= _SECONDS_BETWEEN_LINES:
            self._logged = now
            share = values["spon:sampled_zeroed"] / max(1, values["spon:sampled_inputs"])
            logger.info(
                "SPON: %d sparse and %d dense calls so far, measured sparsity %.1f%%",
                self.sparse_calls, self.dense_calls, 100 * share,
            )  # fmt: skip
        directory = os.environ.get(DIRECTORY_VARIABLE)
        if directory:
            _write(Path(directory) / f"{os.getpid()}.json", values)


COUNTERS = Counters()


class _Collector:
    """Sums the workers' files for prometheus_client."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        total = dict.fromkeys(_HELP, 0)
        for file in self.directory.glob("*.json"):
            for name, value in json.loads(file.read_text()).items():
                total[name] += value
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


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
