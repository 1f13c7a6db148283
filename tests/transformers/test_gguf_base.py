# SPDX-License-Identifier: Apache-2.0
"""Bases in a `.gguf` file: their linears keep its blocks, in memory and merged."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import make_tiny_llama
from transformers import AutoModelForCausalLM

from spon_peft import SponConfig
from spon_plugin.layers.sparse_quantized import SparseQuantizedLinear
from spon_plugin.weights import weight_of
from spon_transformers.gguf import GgufBlockLinear, keep_blocks
from spon_transformers.loading import load_model

gguf = pytest.importorskip("gguf")
IDS = torch.arange(24).reshape(2, 12)
HEADS, KV_HEADS = 4, 2
FORMATS = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4", "Q5_0": "int8"}


def write(path, kind, down=None):
    """A tiny Llama as llama.cpp's converter writes it, rows of queries and keys in its order of rotary halves."""
    model = make_tiny_llama(
        hidden_size=64, intermediate_size=128, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS
    )
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(256)
    for name, tensor in model.state_dict().items():
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:
                tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        stored = names.get_name(name.removesuffix(".weight")) + ".weight"
        own = down if down is not None and "down_proj" in name else kind
        if tensor.dim() == 2 and "layers" in name:
            number = gguf.GGMLQuantizationType[own]
            writer.add_tensor(stored, gguf.quantize(tensor.numpy(), number), raw_dtype=number)
        else:
            writer.add_tensor(stored, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def blocks_in(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, GgufBlockLinear)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", FORMATS)
def test_linears_keep_the_blocks_that_transformers_decodes(tmp_path, kind, dtype):
    file = write(tmp_path / "a.gguf", kind)
    decoded, model = load_model(file, dtype, stored=True), load_model(file, dtype, stored=True, blocks=True)
    assert len(blocks_in(model)) == 14
    for path, linear in blocks_in(model).items():
        weight = weight_of(linear)
        assert weight.format == FORMATS[kind]
        assert torch.equal(weight.dense(decoded.dtype).t(), decoded.get_submodule(path).weight), path
    if dtype == "float32":
        torch.testing.assert_close(logits(model), logits(decoded), rtol=1e-4, atol=1e-4)


def test_merged_it_runs_on_blocks_from_a_file_of_its_own(tmp_path):
    file = write(tmp_path / "a.gguf", "Q4_0")
    torch.manual_seed(1)
    trained = get_peft_model(load_model(file, "float32"), SponConfig(init_weights=False)).eval()
    trained.save_pretrained(tmp_path / "adapter")
    base = load_model(file, "float32", blocks=True)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    layers = {path: m for path, m in loaded.named_modules() if isinstance(m, SparseQuantizedLinear)}
    assert len(layers) == 14 and {layer.row_weight.format for layer in layers.values()} == {"int4"}
    torch.testing.assert_close(logits(loaded), logits(trained), rtol=1e-4, atol=1e-4)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].shape == (128, 64 // 32 * 18), "two blocks of 18 bytes a row"
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)


def test_linears_without_a_mask_keep_their_blocks_when_merged(tmp_path):
    base = load_model(write(tmp_path / "a.gguf", "Q8_0"), "float32", blocks=True)
    torch.manual_seed(1)
    model = get_peft_model(base, SponConfig(target_modules=["down_proj"], init_weights=False)).eval()
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert len(blocks_in(loaded)) == 12
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


def test_what_the_file_does_not_stand_for_stays_as_it_is(tmp_path):
    """Another file's model, a changed weight: no block is put where it does not belong."""
    file = write(tmp_path / "a.gguf", "Q8_0")
    model = load_model(file, "float32")
    changed = "model.layers.1.mlp.gate_proj"
    model.get_submodule(changed).weight.data[3, 5] += 0.25
    kept = keep_blocks(model, file)
    assert len(kept) == 13 and changed not in kept


def test_floats_in_the_file_stay_floats(tmp_path):
    model = load_model(write(tmp_path / "a.gguf", "Q8_0", down="F16"), "float32", blocks=True)
    assert len(blocks_in(model)) == 12
