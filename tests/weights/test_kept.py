# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pytest
import torch
from packed_words import pack
from torch import nn

from spon_plugin.weights import weight_of
from spon_plugin.weights.kept import KeptWeight


class Packed(nn.Module):
    """GPTQ's tensors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.in_features, self.out_features, self.bits = 64, 32, 4
        self.register_buffer("qweight", pack(torch.randint(0, 16, (32, 64)), 4).t().contiguous())
        self.register_buffer("qzeros", pack(torch.full((2, 32), 7), 4))
        self.register_buffer("scales", torch.rand(2, 32).half())
        self.register_buffer("g_idx", (torch.arange(64) // 32).int())


@pytest.fixture
def kept():
    return KeptWeight()


def test_words_are_unpacked_once(kept):
    layer = Packed()
    assert kept.of(layer) is kept.of(layer)
    assert torch.equal(kept.of(layer).dense(), weight_of(layer).dense())


@pytest.mark.parametrize("change", ["written to", "another", "elsewhere", "loaded"])
def test_a_change_is_seen(kept, change):
    layer = Packed()
    before = kept.of(layer).dense()
    if change == "written to":
        layer.qweight ^= 0x11
    elif change == "another":
        layer.scales = 2 * layer.scales
    elif change == "elsewhere":
        layer.qweight.data = layer.qweight.data ^ 0x11
    else:
        layer.load_state_dict({**layer.state_dict(), "scales": 3 * layer.scales})
    assert torch.equal(kept.of(layer).dense(), weight_of(layer).dense())
    assert not torch.equal(kept.of(layer).dense(), before)


def test_views_are_not_kept(kept):
    layer = nn.Module()
    layer.in_features, layer.out_features = 64, 32
    layer.weight = nn.Parameter(torch.ones(32, 64, dtype=torch.int8), requires_grad=False)
    layer.weight_scale = nn.Parameter(torch.ones(32, 1), requires_grad=False)
    assert kept.of(layer) is not kept.of(layer)
    linear = nn.Linear(4, 4)
    assert kept.of(linear).codes.data_ptr() == linear.weight.data_ptr()


def test_copies_and_pickles_start_afresh(kept):
    kept.of(Packed())
    assert copy.deepcopy(kept)._kept is None and pickle.loads(pickle.dumps(kept))._kept is None
