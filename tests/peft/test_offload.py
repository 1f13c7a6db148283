# SPDX-License-Identifier: Apache-2.0
"""Base models whose weights accelerate keeps on disk or in CPU memory: adapters go on them as LoRA's do."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PeftModel, get_peft_model
from spon_models import ids, logits, tiny
from transformers import AutoModelForCausalLM

from spon_lm_eval.arguments import SponArguments
from spon_lm_eval.layers import with_adapter
from spon_peft import SponConfig
from spon_plugin import SponError

MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
}
SPON = dict(task_type="CAUSAL_LM", init_weights=False, center_modules=["down_proj"], channel_modules=["o_proj"])
CONFIGS = {
    "SPON": lambda: SponConfig(**SPON),
    "LoRA": lambda: LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
}


class Case:
    """A base and an adapter on disk, what they compute in memory, and the base as it is offloaded."""

    def __init__(self, path, kind):
        self.path, self.count, self.config = path, 0, CONFIGS[kind]()
        tiny().save_pretrained(path / "base")
        torch.manual_seed(3)
        model = get_peft_model(self.base(), CONFIGS[kind]()).eval()
        model.save_pretrained(path / "adapter")
        self.expected = logits(model)

    def base(self, **kwargs):
        return AutoModelForCausalLM.from_pretrained(self.path / "base", **kwargs).eval()

    def folder(self):
        self.count += 1
        return str(self.path / f"offload{self.count}")

    def offloaded(self):
        return self.base(device_map=MAP, offload_folder=self.folder())

    def fresh(self):
        torch.manual_seed(3)
        return get_peft_model(self.offloaded(), self.config).eval()

    def loaded(self, **kwargs):
        device_map = {f"base_model.model.{path}": device for path, device in MAP.items()}
        options = dict(device_map=device_map, offload_folder=self.folder(), **kwargs)
        return PeftModel.from_pretrained(self.offloaded(), self.path / "adapter", **options).eval()

    def whole(self):
        return PeftModel.from_pretrained(self.base(), self.path / "adapter").eval()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """PEFT writes the files of a base that is loaded from disk once more, below the directory where it runs."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=CONFIGS)
def case(request, tmp_path):
    return Case(tmp_path, request.param)


@pytest.fixture
def spon(tmp_path):
    return Case(tmp_path, "SPON")


def near(model, expected):
    for _ in range(2):  # what one pass brings in, it takes out again
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_added_to_an_offloaded_model(spon):
    near(spon.fresh(), spon.expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_is_loaded_with_a_device_map(case, low_cpu_mem_usage):
    near(case.loaded(low_cpu_mem_usage=low_cpu_mem_usage), case.expected)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_a_model_with_an_adapter_is_offloaded(case, offload_buffers):
    model = cpu_offload(case.whole(), torch.device("cpu"), offload_buffers=offload_buffers)
    near(model, case.expected)


def test_it_is_offloaded_to_disk(spon):
    near(disk_offload(spon.whole(), spon.folder(), torch.device("cpu")), spon.expected)


@pytest.mark.parametrize("make", ["fresh", "loaded"])
def test_folding_and_taking_back(spon, make):
    model = getattr(spon, make)()
    with torch.no_grad():
        dense = logits(spon.base())
        model.merge_adapter()
        near(model, spon.expected)
        model.unmerge_adapter()
        near(model, spon.expected)
        with model.disable_adapter():
            near(model, dense)


def test_a_merged_model_has_its_weights_at_hand(spon):
    model = spon.fresh()
    with pytest.raises(SponError, match="got 'offloaded', expected a floating-point linear, or .* Use `merge_adapter`"):
        model.merge_and_unload()
    near(model, spon.expected)


def test_lm_eval_keeps_an_offloaded_model_offloaded(spon):
    found = with_adapter(spon.offloaded(), SponArguments.of(str(spon.path / "adapter")))
    assert len(found.layers) == 14 and found.sites
    near(found.model, spon.expected)


def test_a_saved_adapter_is_whole(spon, tmp_path):
    spon.loaded().save_pretrained(tmp_path / "again")
    near(PeftModel.from_pretrained(spon.base(), tmp_path / "again").eval(), spon.expected)


def test_ids_may_be_given_twice(spon):
    model = spon.loaded()
    assert logits(model, ids(1, 4)).shape == (1, 4, 64)
