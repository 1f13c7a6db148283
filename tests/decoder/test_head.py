# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tiny_models import make_tiny_llama

from spon_plugin.decoder.head import run_backbone

IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


class Wrapped(torch.nn.Module):
    """Not of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids)


@pytest.mark.parametrize("wrap", [False, True], ids=["transformers", "a module of one's own"])
def test_hooks_see_what_they_see_in_a_whole_pass(wrap):
    model = make_tiny_llama()
    seen, heads = [], []
    last = model.model.layers[-1].mlp.down_proj
    last.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model.lm_head.register_forward_pre_hook(lambda _module, args: heads.append(args[0]))
    model(input_ids=IDS)
    run_backbone(Wrapped(model) if wrap else model, IDS, [last])
    assert torch.equal(*seen) and len(heads) == 1 + wrap


def test_the_head_runs_where_something_looks_at_it():
    model, heads = make_tiny_llama(), []
    model.lm_head.register_forward_pre_hook(lambda _module, args: heads.append(args[0]))
    run_backbone(model, IDS, [model.lm_head, model.model.layers[0]])
    assert len(heads) == 1
