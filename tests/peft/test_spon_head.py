# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import transformers
from spon_models import COMMON, LLAMA, ids

from spon_plugin.decoder.head import OutputHead, find_head

HEADS = {
    "Gemma2ForCausalLM": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "GraniteForCausalLM": {"logits_scaling": 4.0},
    "CohereForCausalLM": {"logit_scale": 0.25},
    "GPTNeoXForCausalLM": {},
}


@pytest.mark.parametrize("architecture", HEADS)
def test_heads(architecture):
    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    arguments = (
        LLAMA | HEADS[architecture] if architecture != "GPTNeoXForCausalLM" else COMMON | {"intermediate_size": 24}
    )
    model = cls(cls.config_class(**arguments)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(8 if parameter.dim() == 2 else 1)
    inputs = {"input_ids": ids()}
    head = find_head(model, inputs)
    assert isinstance(head, OutputHead)
    hidden = model.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(head(hidden), model(**inputs).logits, rtol=1e-4, atol=1e-4)
