# SPDX-License-Identifier: Apache-2.0
"""`autocast_adapter_dtype=False`: alphas follow the base's dtype, thresholds and centres and what is saved never do."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from spon_models import layers, logits, tiny

from spon_peft import SponConfig, collect_adapter
from spon_plugin import read_adapter

CONFIG = dict(task_type="CAUSAL_LM", init_weights=False, center_modules=["down_proj"], target_modules=["down_proj"])


def dtypes(model, kind):
    return {tensor.dtype for layer in layers(model) for tensor in dict(getattr(layer, kind).items()).values()}


def check(model, alpha):
    assert dtypes(model, "spon_alpha") == {alpha}
    assert dtypes(model, "spon_threshold") == dtypes(model, "spon_center") == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_alpha_has_the_dtype_that_was_asked_for(dtype, autocast, low_cpu_mem_usage, tmp_path):
    expected = torch.float32 if autocast else dtype
    model = get_peft_model(tiny(dtype=dtype), SponConfig(**CONFIG), autocast_adapter_dtype=autocast)
    check(model, expected)
    model.save_pretrained(tmp_path)
    options = dict(autocast_adapter_dtype=autocast, low_cpu_mem_usage=low_cpu_mem_usage)
    again = PeftModel.from_pretrained(tiny(dtype=dtype), tmp_path, **options).eval()
    check(again, expected)
    again.load_adapter(tmp_path, "other", **options)
    check(again, expected)
    assert torch.equal(logits(model.eval()), logits(again))


def test_what_is_saved_is_the_format_and_can_be_read(tmp_path):
    model = get_peft_model(tiny(dtype=torch.bfloat16), SponConfig(**CONFIG), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    assert read_adapter(tmp_path).digest == collect_adapter(model).digest


def test_casting_the_model_casts_such_an_alpha_alone():
    model = get_peft_model(tiny(), SponConfig(**CONFIG), autocast_adapter_dtype=False)
    check(model.to(torch.bfloat16), torch.bfloat16)
    check(get_peft_model(tiny(), SponConfig(**CONFIG)).to(torch.bfloat16), torch.float32)


def test_such_an_alpha_trains():
    model = get_peft_model(tiny(dtype=torch.bfloat16), SponConfig(**CONFIG), autocast_adapter_dtype=False)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.float().square().sum().backward()
    grads = [layer.spon_alpha["default"].grad for layer in layers(model)]
    assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() and grad.any() for grad in grads)
