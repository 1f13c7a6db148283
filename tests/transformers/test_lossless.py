# SPDX-License-Identifier: Apache-2.0
"""Lossless generation: the sparse view drafts, the dense model verifies, and both read the same bytes."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from spon_models import KINDS, tiny
from tiny_models import make_tiny_llama
from transformers import AutoModelForCausalLM
from transformers.generation import utils as generation

from spon_peft import SponConfig, collect_adapter
from spon_plugin import Mask, SparseLinear, SponError, write_adapter
from spon_plugin.layers.row_linear import RowLinear, RowQuantizedLinear
from spon_plugin.layers.sparse_quantized import SparseQuantizedLinear
from spon_transformers import dense_view, sparse_view
from spon_transformers.quantize import Rounding, quantize, save_quantized

DOWN = "model.layers.0.mlp.down_proj"
PROMPTS = [torch.randint(1, 64, (1, 5 + i), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def make_adapter(model, **config):
    """An adapter with random thresholds, centres and alphas, that fits `model`."""
    torch.manual_seed(100)
    own = copy.deepcopy(model)
    return collect_adapter(get_peft_model(own, SponConfig(init_weights=False, task_type="CAUSAL_LM", **config)))


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.cat([prompt[:, :5] for prompt in PROMPTS])).logits


def greedy(model, prompt, **more):
    return model.generate(prompt, do_sample=False, max_new_tokens=16, eos_token_id=None, pad_token_id=0, **more)


def forwards(model):
    """A list that grows by the number of rows of every forward pass of `model`."""
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return rows


@pytest.mark.parametrize(("kind", "drafts"), [*((kind, 3) for kind in KINDS), ("llama", 1)])
def test_greedy_text_is_the_dense_models_token_for_token(kind, drafts):
    model = tiny(kind)
    expected, before = [greedy(model, prompt) for prompt in PROMPTS], logits(model)
    view = sparse_view(model, make_adapter(model), drafts)
    assert not torch.allclose(logits(view), before, atol=1e-2)  # it does draft something else
    rows = forwards(model)
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert torch.equal(greedy(model, prompt, assistant_model=view), text)
    assert max(rows[1:]) >= 1 + drafts
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_both_models_are_one_copy_of_the_weights(tied):
    model = make_tiny_llama(tie_word_embeddings=tied)
    held = sum(parameter.nbytes for parameter in model.parameters())
    adapter = make_adapter(model)
    views = [sparse_view(model, adapter), sparse_view(model, adapter.without_alpha())]
    storages = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for each in (model, *views)
        for parameter in each.parameters()
        if parameter.dim() == 2
    }
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters() if p.dim() == 2) < held
    down, drafted = model.get_submodule(DOWN), views[0].get_submodule(DOWN)
    assert (type(down), type(drafted)) == (RowLinear, SparseLinear) and down.weight is drafted.weight
    assert down.weight.t().is_contiguous() and isinstance(model.lm_head, RowLinear)


@pytest.mark.parametrize("prefix", [0, 2])
def test_the_view_computes_what_the_merged_model_does(prefix):
    model = tiny()
    own = SponConfig(init_weights=False, dense_prefix=prefix, center_modules=["down_proj"])
    torch.manual_seed(7)
    sparse = get_peft_model(copy.deepcopy(model), own).eval()
    adapter = collect_adapter(sparse)
    torch.testing.assert_close(logits(sparse_view(model, adapter)), logits(sparse.merge_and_unload()))


def test_an_adapter_in_a_directory_that_leaves_prompts_dense_masks_them_here(tmp_path):
    model = tiny()
    write_adapter(make_adapter(model, tokens="decode"), tmp_path / "adapter")
    expected = greedy(model, PROMPTS[0])
    view = sparse_view(model, tmp_path / "adapter", 2)
    assert not torch.allclose(logits(view), logits(model), atol=1e-2)
    assert torch.equal(greedy(model, PROMPTS[0], assistant_model=view), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_the_dense_model_is_saved_as_it_was(tied, tmp_path):
    model = make_tiny_llama(tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparse_view(model, make_adapter(model))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.get_submodule(DOWN)) is torch.nn.Linear
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in before.items())


def quantized_model(directory, rounding):
    """A tiny quantized model as it is loaded, and an adapter for it."""
    pytest.importorskip("compressed_tensors")
    model = make_tiny_llama(hidden_size=64, intermediate_size=128)
    adapter = make_adapter(model)
    quantize(model, rounding)
    save_quantized(model, directory / "base")
    return AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32).eval(), adapter


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_models_share_their_codes(bits, tmp_path):
    model, adapter = quantized_model(tmp_path, Rounding(bits, 32))
    before = logits(model)
    view = sparse_view(model, adapter, 3)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    down, drafted = model.get_submodule(DOWN), view.get_submodule(DOWN)
    assert (type(down), type(drafted)) == (RowQuantizedLinear, SparseQuantizedLinear)
    assert down.row_weight is drafted.row_weight and down.row_weight.format == f"int{bits}"
    assert float(drafted.spon_threshold) > 0 and getattr(down, "spon_threshold", None) is None
    for prompt in PROMPTS:
        assert torch.equal(greedy(model, prompt, assistant_model=view), greedy(model, prompt))


def test_views_of_a_quantized_model_leave_its_codes_where_they_are(tmp_path):
    model, adapter = quantized_model(tmp_path, Rounding(8, 32))
    # One mask for all that read a tensor, as calibration gives: such layers are called together.
    alike = [replace(adapter, masks={path: Mask(torch.tensor([t])) for path in adapter.masks}) for t in (0.2, 0.3)]
    views = [sparse_view(model, each) for each in alike]
    held = {path: m.row_weight for path, m in model.named_modules() if isinstance(m, RowQuantizedLinear)}
    for view in (*views, *views):
        greedy(view, PROMPTS[0])
        assert all(model.get_submodule(path).row_weight is rows for path, rows in held.items())


def test_the_dense_model_of_a_merged_one():
    model = tiny("qwen2")
    expected, before = [greedy(model, prompt) for prompt in PROMPTS], logits(model)
    torch.manual_seed(100)
    merged = get_peft_model(model, SponConfig(init_weights=False, task_type="CAUSAL_LM")).merge_and_unload()
    sparse = logits(merged)
    dense = dense_view(merged)
    torch.testing.assert_close(logits(dense), before)
    torch.testing.assert_close(logits(merged), sparse)
    merged.generation_config.num_assistant_tokens = 2
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert torch.equal(greedy(dense, prompt, assistant_model=merged), text)
    assert dense.get_submodule(DOWN).weight is merged.get_submodule(DOWN).weight
    assert not hasattr(dense.config, "quantization_config") and hasattr(merged.config, "quantization_config")


def test_the_dense_model_of_a_merged_quantized_checkpoint(tmp_path):
    base, adapter = quantized_model(tmp_path, Rounding(8, None))
    expected = logits(base)
    write_adapter(adapter, tmp_path / "adapter")
    PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    dense = dense_view(merged)
    torch.testing.assert_close(logits(dense), expected, rtol=1e-3, atol=1e-3)
    assert dense.get_submodule(DOWN).row_weight is merged.get_submodule(DOWN).row_weight
    for prompt in PROMPTS[:2]:
        assert torch.equal(greedy(dense, prompt, assistant_model=merged), greedy(dense, prompt))


def test_samples_are_accepted_by_the_two_models_own_distributions(monkeypatch):
    """transformers draws, accepts and draws again from what remains; it must be given the right distributions."""
    model = tiny()
    view = sparse_view(model, make_adapter(model), 2)
    seen, own = [], generation._speculative_sampling

    def spy(ids, drafted, length, verified, **more):
        seen.append((ids, drafted, length, verified))
        return own(ids, drafted, length, verified, **more)

    monkeypatch.setattr(generation, "_speculative_sampling", spy)
    transformers.set_seed(0)
    settings = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
    model.generate(PROMPTS[0], assistant_model=view, max_new_tokens=12, **settings)
    assert len(seen) > 3
    for ids, drafted, length, verified in seen:
        with torch.no_grad():
            dense, sparse = (each(ids).logits[:, -length - 1 :] for each in (model, view))
        torch.testing.assert_close(drafted, sparse[:, :-1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(verified, dense, rtol=1e-3, atol=1e-3)


def test_what_is_no_dense_model_is_refused():
    model = tiny()
    adapter = make_adapter(model)
    with pytest.raises(SponError, match="drafts: got 0, expected a number of at least 1"):
        sparse_view(model, adapter, 0)
    with pytest.raises(SponError, match="PeftModel.*without PEFT around it"):
        sparse_view(get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])), adapter)
    with pytest.raises(SponError, match="layers.0"):
        sparse_view(tiny("gpt2"), adapter)
    with pytest.raises(
        SponError, match=r"a dense LlamaForCausalLM', expected a merged one.*sparse_view\(model, adapter"
    ):
        dense_view(model)
    merged = get_peft_model(tiny(), SponConfig(init_weights=False)).merge_and_unload()
    with pytest.raises(SponError, match="sparse layers such as"):
        sparse_view(merged, adapter)
    prompts = get_peft_model(tiny(), SponConfig(init_weights=False, tokens="decode")).merge_and_unload()
    with pytest.raises(SponError, match=r"tokens: got 'decode'.*sparse_view\(base, adapter\)"):
        dense_view(prompts)
    merged.get_submodule(DOWN).spon_dense_bias = None
    with pytest.raises(SponError, match=r"spon_dense_bias.*Merge again"):
        dense_view(merged)
    assert all(type(module) is not RowLinear for module in (*model.modules(), *merged.modules()))


def test_weights_without_rows_are_refused_before_anything_changes(monkeypatch):
    model = tiny()
    adapter = make_adapter(model)
    linear = model.get_submodule("model.layers.1.mlp.up_proj")
    linear.__class__ = type(
        "Scaled", (torch.nn.Linear,), {"forward": lambda self, x: 2 * torch.nn.Linear.forward(self, x)}
    )
    with pytest.raises(SponError, match=r"layers\.1\.mlp\.up_proj.*a forward of its own"):
        sparse_view(model, adapter)
    assert type(model.get_submodule(DOWN)) is torch.nn.Linear
