# SPDX-License-Identifier: Apache-2.0
"""Blocks that are run one by one give what the whole model gives."""

import pytest
import torch
from tiny_models import make_tiny_llama
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from spon_plugin.decoder.blockwise import Blockwise


def gemma():
    """With blocks that attend to all tokens and blocks that attend to the last four."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [make_tiny_llama, gemma], ids=["llama", "gemma"])
@torch.no_grad()
def test_block_by_block_is_the_model(make):
    model = make()
    windows = torch.arange(5 * 12).reshape(5, 12) % 60
    blocks = Blockwise(model, windows, batch_size=2)
    assert [len(states) for states in blocks.first] == [2, 2, 1]
    states = blocks.first
    for index in range(len(blocks.blocks)):
        states = [blocks.run(index, batch, each) for batch, each in enumerate(states)]
    expected = model.model(input_ids=windows).last_hidden_state
    torch.testing.assert_close(model.model.norm(torch.cat(states)), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())
