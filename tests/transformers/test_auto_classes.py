# SPDX-License-Identifier: Apache-2.0
"""A merged checkpoint loads with whatever class the dense one loads with: backbone, head, another head."""

import pytest
import torch
from spon_models import ids, sparse
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from spon_plugin import SponError
from spon_plugin.layers.sparse_linear import SparseConv1D, SparseLinear

CONFIGS = {
    "thresholds": dict(),
    "vectors": dict(channel_modules="all", center_modules="all"),
    "a sparse head": dict(target_modules=["lm_head", "down_proj"]),
}


def sparse_layers(model):
    return [m for m in model.modules() if isinstance(m, SparseLinear | SparseConv1D)]


@torch.no_grad()
def hidden(model):
    """The last hidden states, ``[batch, sequence, hidden]``, of a backbone or of a model with a head."""
    return model(input_ids=ids(), output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_backbone_of_a_merged_model(config, tmp_path):
    merged = sparse(**config).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    backbone = AutoModel.from_pretrained(tmp_path / "merged").eval()
    assert len(sparse_layers(backbone)) == len(sparse_layers(merged.base_model)) > 0
    assert torch.equal(hidden(backbone), hidden(merged))
    backbone.save_pretrained(tmp_path / "backbone")
    assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path / "backbone").eval()), hidden(backbone))


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_other_architectures(kind, tmp_path):
    merged = sparse(kind).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path).eval()), hidden(merged))


@pytest.mark.parametrize("config", [CONFIGS["thresholds"], CONFIGS["vectors"]], ids=["thresholds", "vectors"])
@pytest.mark.parametrize("prefix", [0, 1])
def test_a_backbone_gets_a_head(config, prefix, tmp_path):
    sparse(dense_prefix=prefix, **config).merge_and_unload().save_pretrained(tmp_path / "merged")
    backbone = AutoModel.from_pretrained(tmp_path / "merged").eval()
    backbone.save_pretrained(tmp_path / "backbone")
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        model = auto.from_pretrained(tmp_path / "backbone").eval()
        assert torch.equal(hidden(model), hidden(backbone))


def test_a_layer_that_is_nowhere_is_named(tmp_path):
    merged = sparse(target_modules=["down_proj"]).merge_and_unload()
    merged.config.quantization_config.thresholds["model.layers.7.mlp.down_proj"] = 0.1
    merged.save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(SponError, match=r"threshold of model\.layers\.7\.mlp\.down_proj: got 'a layer that is mi"):
            auto.from_pretrained(tmp_path)
