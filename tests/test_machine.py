# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from spon_plugin import SponError, machine


@pytest.fixture(autouse=True)
def _fresh():
    machine.native_dtypes.cache_clear()
    yield
    machine.native_dtypes.cache_clear()


@pytest.mark.parametrize(
    ("value", "native"),
    [
        ("none", set()),
        ("", set()),
        ("bfloat16", {torch.bfloat16}),
        ("float16, bfloat16", {torch.bfloat16, torch.float16}),
    ],
)
def test_the_environment_overrides_what_torch_says(monkeypatch, value, native):
    monkeypatch.setenv(machine.OVERRIDE, value)
    assert machine.native_dtypes() == native
    for dtype in (torch.bfloat16, torch.float16):
        assert machine.is_native(dtype) == (dtype in native)
        assert machine.compute_dtype(dtype) == (dtype if dtype in native else torch.float32)
        assert machine.compute_dtype(dtype, "cuda") == dtype
    for dtype in (torch.float32, torch.float64):
        assert machine.compute_dtype(dtype) == dtype


def test_another_dtype_in_the_override_is_refused(monkeypatch):
    monkeypatch.setenv(machine.OVERRIDE, "int8")
    with pytest.raises(SponError, match="SPON_NATIVE_DTYPES: got 'int8', expected comma-separated names out of"):
        machine.native_dtypes()


def test_without_the_override_it_is_what_torch_says(monkeypatch):
    monkeypatch.delenv(machine.OVERRIDE, raising=False)
    assert machine.is_native(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert machine.is_native(torch.float16) == torch.ops.mkldnn._is_mkldnn_fp16_supported()


def test_a_torch_without_onednn_emulates_both(monkeypatch):
    monkeypatch.delenv(machine.OVERRIDE, raising=False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert machine.native_dtypes() == frozenset()


@pytest.mark.parametrize(("value", "word"), [("none", "emulated"), ("bfloat16", "native")])
def test_the_description_says_what_kind_of_cpu_it_is(monkeypatch, value, word):
    monkeypatch.setenv(machine.OVERRIDE, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    assert machine.description() == f"CPU, 1 core, 2 threads, bfloat16 {word}, no GPU"


def test_the_description_names_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert machine.description() == "GPU, NVIDIA H100"
