# SPDX-License-Identifier: Apache-2.0
"""`max_sparse_tokens: auto` with a clock of the test's: where sparse steps stop, what is kept, and what is said."""

import json
import logging

import pytest
import torch
from layers import load, make_layer, one_process
from quantized import FORMATS

from spon_plugin import Mask
from spon_plugin.kernels.few_rows import CPU_ROWS
from spon_vllm import crossover, hosts, ops, steps
from spon_vllm.crossover import BASE, DENSE, SPARSE, Kind, Table
from spon_vllm.settings import MEASURED, resolve

GEMM = "gemm"
IN, SIZES, EIGHT_BITS = 128, [64, 32], "int8 and inputs in 8 bits"
KIND = Kind(IN, sum(SIZES), "int8 beside", 1)


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    with one_process(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    for name, value in (("_measured", 1), ("_graph_sizes", None), ("_most_requests", 0)):
        monkeypatch.setattr(steps, name, value)
    return tmp_path / "spon"


@pytest.fixture
def said(monkeypatch):
    texts, handler = [], logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    logger = logging.getLogger("vllm.spon")
    monkeypatch.setattr(logger, "handlers", [handler])
    before = logger.level
    logger.setLevel(logging.INFO)
    yield texts
    logger.setLevel(before)


def make(format=None, tau=0.5, measures=True, dtype=torch.bfloat16):
    """A fused layer whose limit is measured, filled, but not ready."""
    masks = [Mask(torch.tensor([tau]), alpha=torch.zeros(IN)) for _ in SIZES]
    inner = None if format is None else FORMATS[format].config()
    settings = {"token_mode": "decode", "measures": measures, "sparsity": 0.5, "max_sparse_tokens": 2}
    model = make_layer(SIZES, IN, masks, False, inner, dtype, **settings)
    if format is None:
        model.l.weight.data.normal_()
    else:
        load(model.l, **FORMATS[format].tensors(0, SIZES, IN, dtype)[0])
    return model.l


class Clock:
    """Says how long a sweep took by what it ran: seconds by way and rows."""

    def __init__(self, monkeypatch, seconds):
        self.seconds, self.ran = seconds, []
        for owner, name, way in ((ops, "sparse_linear", SPARSE), (ops, "dense_linear", GEMM), (hosts, "dense", BASE)):
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name), way))
        monkeypatch.setattr(crossover, "seconds_of", self)

    def _watched(self, run, way):
        def watched(*args, **kwargs):
            x = args[1] if way == BASE else args[0]
            own = way == SPARSE and not bool(args[2].any())  # a threshold of nothing: dense, by our kernels
            self.ran.append((DENSE if own else way, x.shape[0]))
            return run(*args, **kwargs)

        return watched

    def __call__(self, call, device):
        self.ran.clear()
        call()
        ((way, rows),) = set(self.ran)
        return len(self.ran) * self.seconds(DENSE if way == GEMM else way, rows)


def until(limit, own=0):
    """Sparse steps win up to `limit` rows; in dense ones, our kernels up to `own` rows."""

    def seconds(way, rows):
        dense = 1.0 if rows <= own else 3.0
        return {SPARSE: 0.5 if rows <= limit else 4.0, DENSE: dense, BASE: 2.0}[way]

    return seconds


@pytest.mark.parametrize("limit", [1, 2, 3, CPU_ROWS])
def test_the_limit_is_where_sparse_steps_stop_to_gain(limit, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    clock = Clock(monkeypatch, until(limit, own=0))
    layer = make()
    layer.quant_method.process_weights_after_loading(layer)
    assert steps.measured() == limit
    clock.ran.clear()
    for rows in (limit, limit + 1):
        layer(torch.randn(rows, IN).bfloat16())
    assert clock.ran == [(SPARSE, limit), (GEMM if limit == CPU_ROWS else DENSE, limit + 1)]


def test_what_gains_too_little_runs_dense(monkeypatch):
    Clock(monkeypatch, lambda way, rows: 0.97 if way == SPARSE else 1.0)
    layer = make()
    layer.quant_method.process_weights_after_loading(layer)
    assert steps.measured() == 1  # of one token alone: what an adapter is asked for


@pytest.mark.parametrize("own", [0, 2, CPU_ROWS])
def test_dense_steps_beside_a_method_run_where_they_are_faster(own, monkeypatch):
    clock = Clock(monkeypatch, until(1, own))
    layer = make(EIGHT_BITS)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.spon_own_rows == own and steps.measured() == 1
    clock.ran.clear()
    for rows in (2, CPU_ROWS):
        layer(torch.randn(rows, IN).bfloat16())
    assert clock.ran == [(DENSE if rows <= own else BASE, rows) for rows in (2, CPU_ROWS)]


def test_without_a_measurement_a_machine_without_products_of_bytes_runs_few_rows_by_our_kernels(monkeypatch):
    for capability, rows in (("AVX2", CPU_ROWS), ("DEFAULT", CPU_ROWS), ("AVX512", 0), ("AVX512_VNNI", 0)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert hosts.few_rows(torch.device("cpu")) == rows and hosts.few_rows(torch.device("cuda")) == 0


@pytest.mark.parametrize(("capability", "ways"), [("AVX2", [DENSE]), ("AVX512", [GEMM])])
def test_few_rows_of_a_plain_layer_are_dense_where_that_is_fast(capability, ways, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    layer = make(measures=False, dtype=torch.float32)
    layer.quant_method.process_weights_after_loading(layer)
    clock, x = Clock(monkeypatch, None), torch.randn(CPU_ROWS, IN)
    torch.testing.assert_close(layer(x)[0], x @ layer.weight.t(), rtol=1e-4, atol=1e-4)
    assert clock.ran == [(way, CPU_ROWS) for way in ways]
    layer(torch.randn(CPU_ROWS + 1, IN))
    assert clock.ran[1:] == [(GEMM, CPU_ROWS + 1)]


def test_inputs_are_thinned_out_as_the_adapter_says():
    layer = make(tau=0.7, measures=False)
    layer.quant_method.process_weights_after_loading(layer)
    x = crossover._inputs(layer, 64, 0.8)
    assert x.shape == (64, IN) and x.dtype == torch.bfloat16
    assert 0.75 < (x.abs() <= 0.7).float().mean() < 0.85
    assert (x != 0).all()  # a dense step would skip them, too
    layer.spon_threshold.data.zero_()
    assert (crossover._inputs(layer, 64, 0.8) != 0).all()  # nothing to skip


def test_a_table_is_kept_and_said(cache, monkeypatch, said):
    clock = Clock(monkeypatch, until(4, own=2))
    for _ in range(2):
        layer = make(EIGHT_BITS)
        layer.quant_method.process_weights_after_loading(layer)
        assert steps.measured() == 4 and layer.spon_own_rows == 2
        clock.seconds = None  # the second time nothing is timed
        steps.set_measured(1)
    (file,) = cache.iterdir()
    first, second = (text for text in said if "max_sparse_tokens is 4, where 2 is the rule at 50%" in text)
    assert "measured in" in first and "measured in" not in second and str(file) in second
    lines = [line.split() for line in first.splitlines()]
    assert ["1", "128", "96", "int8", "beside", "4", "500000", "3000000", "2000000"] in lines
    assert ["1", "all", "5", "4000000", "2000000"] in lines  # the whole step, where it was lost
    assert any("up to 4 tokens" in text for text in said)

    held = json.loads(file.read_text())
    held["key"]["machine"] = "another"
    for broken in (json.dumps(held), "{", "[]"):
        file.write_text(broken)
        clock.seconds = until(3)
        layer = make(EIGHT_BITS)
        layer.quant_method.process_weights_after_loading(layer)
        assert steps.measured() == 3  # measured again


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path, monkeypatch, said):
    (tmp_path / "spon").write_text("a file")
    Clock(monkeypatch, until(3))
    layer = make()
    layer.quant_method.process_weights_after_loading(layer)
    assert steps.measured() == 3 and any("is not kept" in text for text in said)


def test_steps_have_the_sizes_of_graphs_and_no_more_rows_than_requests(monkeypatch):
    assert steps.sizes(8) == list(range(1, 9))
    monkeypatch.setattr(steps, "_most_requests", 3)
    assert steps.sizes(8) == [1, 2, 3]
    monkeypatch.setattr(steps, "_graph_sizes", (1, 2, 4, 8, 16, 24))
    assert steps.sizes(16) == [1, 2, 4, 8, 16]
    monkeypatch.setattr(steps, "_graph_sizes", (32,))
    assert steps.sizes(16) == [1]


def test_a_table_survives_a_file():
    table = Table({KIND: 4}, {(KIND, way, 2): 0.1 for way in (SPARSE, DENSE, BASE)})
    assert Table.from_json(json.loads(json.dumps(table.as_json()))) == table


def test_time_passes():
    assert 0 < crossover.seconds_of(lambda: torch.ones(1000).sum(), torch.device("cpu")) < 10


@pytest.mark.parametrize("way", ["config", "environment"])
def test_auto_is_asked_for(way, adapter, monkeypatch):
    monkeypatch.setenv("SPON_ADAPTER", str(adapter))
    given = {"max_sparse_tokens": "auto"} if way == "config" else {}
    if way == "environment":
        monkeypatch.setenv("SPON_MAX_SPARSE_TOKENS", "auto")
    settings, _ = resolve({"quant_method": "spon", **given}, None)
    assert settings.limit == MEASURED and settings.max_sparse_tokens == 2
    assert settings.as_config({})["max_sparse_tokens"] == "auto"  # a number would be kept by a compile cache
    assert resolve(settings.as_config({}), None)[0] == settings
    assert resolve({"quant_method": "spon", "token_mode": "all", **given}, None)[0].limit == -1
